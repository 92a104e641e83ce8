"""The server benchmark tables, from a record written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_hf.core.errors import DataError
from tools.tables.serving import restarts, serving, streamed_texts, text_forms


def side(**values: Any) -> dict[str, Any]:
    return {"requests": 1234, "per_second": 61.25, "p50_ms": 15.04, "p99_ms": 40.26, "errors": 0, "wrong": 0, **values}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    record = {
        "work": {"model": "tiny-roberta", "init": "random", "precision": "bf16", "adapters": 8, "clients": 64},
        "one_at_a_time": side(),
        "together": side(requests=9000, per_second=245.0, errors=2, wrong=1),
        "ratio": 4.0,
        "replaced": {"times": 50, "failed": 3, "milliseconds": [10.0, 30.0, 21.0]},
        "started_in_seconds": 5.55,
        "started_again_in_seconds": 4.25,
        "after_the_restart": side(wrong=6),
        "memory": {"base_mib": 87.4, "without_models_mib": 401.6, "before_mib": 640.0, "after_mib": 661.2},
    }
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "a.json").write_text(json.dumps(record))
    return tmp_path


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_row_of_one_client_comes_first(results: Path) -> None:
    name = "[tiny-roberta (random weights) in bf16, 8 adapters](results/serving/a.json)"
    assert cells(serving(results)) == [
        [name, "1", "1,234", "61.2", "15.0", "40.3", "0", "0", "1"],
        [name, "64", "9,000", "245.0", "15.0", "40.3", "2", "1", "4.00"],
    ]


def test_replacements_and_restart_have_a_row(results: Path) -> None:
    name = "[tiny-roberta (random weights) in bf16](results/serving/a.json)"
    assert cells(restarts(results)) == [[name, "50", "3", "21", "5.5", "4.2", "6", "87", "402", "640", "661"]]


def test_missing_and_damaged_records_are_errors(tmp_path: Path, results: Path) -> None:
    with pytest.raises(DataError, match="serving: no records"):
        serving(tmp_path / "nowhere")
    (results / "serving" / "b.json").write_text("{")
    with pytest.raises(DataError, match=r"b\.json: not a readable record"):
        restarts(results)


def test_streamed_texts_stand_beside_those_of_transformers(tmp_path: Path) -> None:
    part = {"tokens_per_second": 80.25, "first_token_p50_ms": 200.0, "first_token_p99_ms": 951.0, "errors": 0}
    record = {
        "work": {"model": "smollm2", "precision": "fp32", "clients": 16},
        **dict.fromkeys(("alone", "one_adapter", "two_adapters"), part),
        "memory": {"after_mib": 1273.4},
        "transformers_serve": {
            "alone": part,
            "together": {**part, "tokens_per_second": 11.2},
            "memory_mib": 13664.8,
        },
    }
    (tmp_path / "serving-texts").mkdir()
    (tmp_path / "serving-texts" / "a.json").write_text(json.dumps(record))
    rows = cells(streamed_texts(tmp_path))
    assert [row[2] for row in rows] == ["1", "16", "16", "1", "16"]
    assert rows[2][3:] == ["80.2", "200", "951", "0", "1273"]
    assert rows[4][1:4] == ["transformers serve, base alone", "16", "11.2"]
    assert rows[4][-1] == "13665"


def test_each_form_of_a_base_has_a_row(tmp_path: Path) -> None:
    side = {"base_mib": 128.4, "mean_difference": 0.012, "largest_difference": 0.5, "same_next_token": 0.981}
    (tmp_path / "text-forms").mkdir()
    (tmp_path / "text-forms" / "a.json").write_text(json.dumps({"forms": {"nf4": {**side, "equal_texts": 0.25}}}))
    assert cells(text_forms(tmp_path)) == [
        ["[nf4](results/text-forms/a.json)", "128", "1.2e-02", "5.0e-01", "98.1%", "25%"]
    ]
