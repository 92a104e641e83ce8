"""All columns of a user's file survive beside the predicted ones, in every pair of formats."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lora_hf.core.errors import ConfigError
from lora_hf.data.tables import add_columns, check_output, read_table, write_table

ADDED = [{"label": "good", "probability_good": 0.75}, {"label": "bad", "probability_good": 0.25}]
CSV = 'id,text,note\n007,"a, ""b""","two\nlines"\n8,c,\n'


def copied(source: Path, target: Path) -> Path:
    table, renamed = add_columns(read_table(source, "text"), ADDED)
    assert renamed == {}
    write_table(target, table)
    return target


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "in.csv").write_text(CSV)
    return tmp_path / "in.csv"


def test_a_csv_file_keeps_every_field_as_written(table: Path, tmp_path: Path) -> None:
    with copied(table, tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["id", "text", "note", "label", "probability_good"],
            ["007", 'a, "b"', "two\nlines", "good", "0.75"],
            ["8", "c", "", "bad", "0.25"],
        ]


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".json", ".parquet"])
def test_other_formats_hold_the_same(table: Path, tmp_path: Path, suffix: str) -> None:
    again = read_table(copied(table, tmp_path / f"out{suffix}"), "text")
    rows = again.to_pylist() if isinstance(again, pyarrow.Table) else again
    assert [row["id"] for row in rows] == ["007", "8"]
    assert [row["note"] for row in rows] == ["two\nlines", ""]
    assert [str(row["probability_good"]) for row in rows] == ["0.75", "0.25"]


def test_json_lines_keep_values_of_any_type(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "x": {"deep": [1, "b"]}}, {"text": "b", "x": 3, "only": None}]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    lines = copied(tmp_path / "in.jsonl", tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{**row, **new} for row, new in zip(rows, ADDED, strict=True)]
    with pytest.raises(ConfigError, match="column 'x' has values of several types"):
        copied(tmp_path / "in.jsonl", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_a_parquet_file_keeps_its_types(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    source = pyarrow.table({"text": ["a", "b"], "day": [day, None], "n": pyarrow.array([1, 2], pyarrow.int8()),
                            "blob": [b"x", b"y"], "x": [float("nan"), 1.5]})  # fmt: skip
    parquet.write_table(source, tmp_path / "in.parquet")
    again = parquet.read_table(copied(tmp_path / "in.parquet", tmp_path / "out.parquet"))
    assert again.select(source.column_names).equals(source) or again.schema.field("n").type == pyarrow.int8()
    assert again["label"].to_pylist() == ["good", "bad"]
    with pytest.raises(ConfigError, match="bytes b'x' is neither text nor number"):
        copied(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    parquet.write_table(source.drop_columns(["blob"]), tmp_path / "in.parquet")
    lines = copied(tmp_path / "in.parquet", tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"text": "a", "day": "2026-01-02", "n": 1, "x": None, **ADDED[0]}


def test_lines_of_text_become_a_column(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a\nb, c\n")
    assert copied(tmp_path / "in.txt", tmp_path / "out.csv").read_text().splitlines()[2] == '"b, c",bad,0.25'


def test_lists_of_labels_in_a_field(tmp_path: Path) -> None:
    write_table(tmp_path / "out.csv", [{"labels": ["a", "b"]}, {"labels": []}, {"labels": ["a|b"]}])
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == ["a|b", '""', '"[""a|b""]"']


def test_a_column_of_the_file_keeps_its_name() -> None:
    rows: list[dict[str, Any]] = [{"label": "x", "label_predicted": "y"}] * 2
    table, renamed = add_columns(rows, ADDED)
    assert renamed == {"label": "label_predicted_2"}
    assert isinstance(table, list)
    assert table[0] == {"label": "x", "label_predicted": "y", "label_predicted_2": "good", "probability_good": 0.75}


def test_where_nothing_can_be_written(table: Path, tmp_path: Path) -> None:
    for output, expected in (
        (table, "this is the --input file"),
        (tmp_path / "out.txt", "ends in .parquet, .csv, .tsv, .jsonl, .json, found .txt"),
        (tmp_path / "out", "found no suffix"),
        (tmp_path / "none" / "out.csv", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=expected):
            check_output(output, table)
