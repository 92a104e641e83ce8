"""Custom tasks: rows from each file format, and every way in which files and config can disagree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.custom import task_section
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.data.tasks.registry import task_of
from lora_hf.data.tasks.sources import DATA_DIR_VARIABLE
from lora_hf.models.load import load_tokenizer
from tests.support.split_files import columns, message

TEAMS = TaskConfig(
    "tickets",
    kind="classification",
    text_columns=("subject", "body"),
    label_column="team",
    label_names=("billing", "network"),
)
CSV = 'subject,body,team,number\nInvoice,"Two, not one",billing,7\nNo line,"It says ""down""",network,8\n'
ROWS = {"subject": ["Invoice", "No line"], "body": ["Two, not one", 'It says "down"'], "label": [0, 1]}
PRICES = TaskConfig("prices", kind="regression", label_column="price")
ANSWERS = TaskConfig("answers", kind="generation")


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(CSV)
    assert columns(TEAMS, tmp_path) == ROWS


def test_json_lines(tmp_path: Path) -> None:
    whole = [dict(zip(("subject", "body"), pair, strict=True)) for pair in zip(*list(ROWS.values())[:2], strict=True)]
    (tmp_path / "train.jsonl").write_text(
        lines([{**whole[0], "team": "billing", "more": [1, 2]}, {**whole[1], "team": "network"}])
    )
    assert columns(TEAMS, tmp_path) == ROWS


def test_a_parquet_file_with_named_classes(tmp_path: Path) -> None:
    """The ids of the file mean its own names, whatever their order in the config."""
    features = Features(subject=Value("string"), body=Value("string"), team=ClassLabel(names=["network", "billing"]))
    rows = Dataset.from_dict({**{name: ROWS[name] for name in ("subject", "body")}, "team": [1, 0]}, features=features)
    (tmp_path / "tickets").mkdir()
    rows.to_parquet(str(tmp_path / "tickets" / "train.parquet"))
    assert columns(TEAMS, tmp_path) == ROWS


@pytest.mark.parametrize("written", [["0", "1"], ["billing", "1"]])
def test_a_class_may_be_written_as_its_number(tmp_path: Path, written: list[str]) -> None:
    (tmp_path / "train.csv").write_text(CSV.replace("billing", written[0]).replace("network", written[1]))
    assert columns(TEAMS, tmp_path)["label"] == [0, 1]


def test_numbers_that_are_names_are_no_ids(tmp_path: Path) -> None:
    stars = TaskConfig("stars", kind="classification", label_names=("1", "2", "3"))
    (tmp_path / "train.jsonl").write_text(lines([{"text": "good", "label": 3}, {"text": "bad", "label": 1}]))
    assert columns(stars, tmp_path)["label"] == [2, 0]
    (tmp_path / "train.jsonl").write_text(lines([{"text": "good", "label": 3}, {"text": "bad", "label": 0}]))
    assert message(stars, tmp_path) == (
        f"{tmp_path}/train.jsonl: row 1 (counting from 0) has the label 0 in column 'label'; expected one of "
        "task.label_names (1, 2, 3); the column holds 3 (1), 0 (1)"
    )


def test_true_and_false(tmp_path: Path) -> None:
    spam = TaskConfig("spam", kind="classification", label_names=("false", "true"))
    (tmp_path / "train.jsonl").write_text(lines([{"text": "buy", "label": True}, {"text": "hi", "label": False}]))
    assert columns(spam, tmp_path)["label"] == [1, 0]


def test_scores_of_any_size_and_sign(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,price\na,-1\nb,12.5\nc,-1.0\n")
    rows = columns(PRICES, tmp_path)
    assert rows == {"text": ["a", "b", "c"], "label": [-1.0, 12.5, -1.0]}
    task = cast(TextClassification, task_of(PRICES))
    tokenizer = load_tokenizer(ModelConfig(name="tiny-roberta"))
    assert task.encode(rows, tokenizer, 16)["labels"] == [-1.0, 12.5, -1.0], "-1 is a score here, and hides nothing"
    assert task.score([[-2.0], [9.0], [-2.0]], rows["label"])["pearson"] == pytest.approx(1)


@pytest.mark.parametrize("score", ["nan", "much", ""])
def test_what_is_no_score(tmp_path: Path, score: str) -> None:
    (tmp_path / "train.csv").write_text(f"text,price\na,1\nb,{score}\n")
    assert "row 1 (counting from 0)" in message(PRICES, tmp_path)


def test_texts_to_write(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        lines([{"prompt": " Say\nhello ", "completion": "Hello\nyou."}, {"prompt": "Say\nhello", "completion": "Hi."}])
    )
    task = cast(TextGeneration, task_of(ANSWERS))
    rows = task.load(str(tmp_path), ["train"])["train"]
    (group,) = task.groups(rows)
    assert (group.context, group.references) == ("Say\nhello", ("Hello\nyou.", "Hi."))
    assert task.context(" Say\nhello ") == group.context


WRONG: dict[str, tuple[str, str]] = {
    "no such column": (CSV.replace("team", "teem"), "no column 'team' (did you mean 'teem'?); found: subject, body, "),
    "an unknown class": (
        CSV.replace("network", "netwrok"),
        "'netwrok' in column 'team'; expected one of task.label_names (billing, network) (did you mean 'network'?)",
    ),
    "a number too high": (CSV.replace("network", "2"), "has the label '2' in column 'team'"),
    "a row too short": (CSV + "a,b\n", "has 2 fields; expected 4"),
    "a header twice": (CSV.replace("number", "team"), "the header names 'team' more than once"),
    "no rows": ("subject,body,team\n", "no rows; expected at least one"),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    found = message(TEAMS, tmp_path)
    assert found.startswith(f"{tmp_path}/train.csv")
    assert expected in found


def test_wrong_lines(tmp_path: Path) -> None:
    for line, expected in (
        ("{", "line 2: not a JSON object"),
        ("[]", "line 2: expected an object"),
        ('{"prompt": 3, "completion": "b"}', "'prompt' has values of several types"),
    ):
        (tmp_path / "train.jsonl").write_text(f'{{"prompt": "a", "completion": "b"}}\n{line}\n')
        assert expected in message(ANSWERS, tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": 3, "completion": "b"}\n')
    assert "column 'prompt' should hold text (string), found int64" in message(ANSWERS, tmp_path)


def test_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(TEAMS, None).startswith("tickets: no data folder is set. Set task.data_dir=DIR")
    assert message(TEAMS, tmp_path / "x").startswith(f"task.data_dir={tmp_path}/x is not a folder. Set")
    assert f"no file with the rows of split 'train' in {tmp_path} (task.data_dir)" in message(TEAMS, tmp_path)
    (tmp_path / "train.csv").write_text(CSV)
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    assert columns(TEAMS, None) == ROWS
    parquet.write_table(pyarrow.table({"subject": ["a"]}), tmp_path / "train.parquet")
    assert message(TEAMS, tmp_path) == (
        f"tickets: split 'train' is in {tmp_path}/train.csv and in {tmp_path}/train.parquet; keep one of them"
    )


INCOMPLETE: dict[str, tuple[dict[str, Any], str]] = {
    "no classes": ({"label_names": ()}, "task.label_names: expected two or more different classes"),
    "a class twice": ({"label_names": ("a", "b", "a")}, "found a, b, a"),
    "three texts": ({"text_columns": ("a", "b", "c")}, "task.text_columns: expected one or two columns, found a, b, c"),
    "the label as a text": ({"text_columns": ("team",)}, "task.label_column: 'team' is one of task.text_columns"),
    "a text called label": ({"text_columns": ("label",)}, "task.text_columns: a text column cannot be called 'label'"),
    "a metric of another kind": ({"metric": "pearson"}, "task.metric: expected one of accuracy, macro_f1, "),
    "classes of a score": ({"kind": "regression"}, "task.kind=regression has no classes"),
    "two prompts": ({"kind": "generation"}, "task.text_columns: expected one column, found subject, body"),
    "no kind": ({"kind": None}, "also set task.kind"),
    "a name of ours": ({"name": "sst2"}, "sst2 is a built-in task; give yours another task.name"),
    "a path as name": ({"name": "a/b"}, "task.name: expected at most 100 letters"),
}


@pytest.mark.parametrize(("change", "expected"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_incomplete_configs(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_of(replace(TEAMS, **change))
    assert expected in str(error.value)


def test_the_section_of_a_task_makes_the_same_task() -> None:
    again = TaskConfig(**task_section(task_of(replace(TEAMS, data_dir="elsewhere", max_length=8))))
    assert again == replace(TEAMS, data_dir=None)
    assert task_of(again) == task_of(TEAMS)
    assert task_section(task_of(TaskConfig("sst2"))) == {"name": "sst2"}
