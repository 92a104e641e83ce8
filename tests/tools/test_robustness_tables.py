"""The robustness tables, from records written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_hf.core.errors import DataError
from tools.tables.robustness import damaged, kills, malformed, malformed_answers


def write(folder: Path, name: str, record: object) -> None:
    (folder / "robustness").mkdir(exist_ok=True)
    (folder / "robustness" / name).write_text(json.dumps(record))


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_damaged_input_is_counted_by_kind(tmp_path: Path) -> None:
    record = {
        "counts": {"adapters": {"refused": 1406, "used": 46}, "data": {"refused": 3, "escaped": 2}},
        "worst": {"adapters": {"seconds": 0.04, "memory": 0}, "data": {"seconds": 1.93, "memory": 259448832}},
    }
    write(tmp_path, "input.json", record)
    assert cells(damaged(tmp_path)) == [
        ["adapters", "1,452", "1,406", "46", "0", "0.0", "0"],
        ["data", "5", "3", "0", "2", "1.9", "259"],
    ]


def test_malformed_requests_are_counted_by_operation_and_by_response(tmp_path: Path) -> None:
    record = {
        "operations": {"POST /v1/classify": {"requests": 1203, "malformed": 1200, "accepted": 3}},
        "totals": {"requests": 1205, "malformed": 1200, "accepted": 3, "failed": 2},
        "answers": {"200": 3, "422 invalid_request": 1200, "500 internal": 2},
    }
    write(tmp_path, "http.json", record)
    assert cells(malformed(tmp_path)) == [
        ["POST /v1/classify", "1,203", "1,200", "0", "3", "0", "0"],
        ["all", "1,205", "1,200", "0", "3", "0", "2"],
    ]
    assert cells(malformed_answers(tmp_path)) == [["200", "3"], ["422 invalid_request", "1,200"], ["500 internal", "2"]]


def test_each_kill_has_a_row(tmp_path: Path) -> None:
    record = {
        "kills": [
            {"seconds": 2.5, "checkpoint": "checkpoint-6", "while_writing": True, "differences": []},
            {"seconds": 0.125, "checkpoint": None, "while_writing": False, "differences": ["metrics", "best"]},
        ]
    }
    write(tmp_path, "kills.json", record)
    assert cells(kills(tmp_path)) == [
        ["1", "2.50", "checkpoint-6", "yes", "none"],
        ["2", "0.12", "step 0", "no", "metrics, best"],
    ]


def test_without_a_record_the_command_is_shown_and_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    assert damaged(tmp_path) == (
        "Not recorded yet: run `python -m tests.support.damaged_inputs --output docs/results/robustness/input.json`."
    )
    assert kills(tmp_path).endswith("run `python -m tests.support.kills --output docs/results/robustness/kills.json`.")
    assert malformed(tmp_path) == malformed_answers(tmp_path)
    assert malformed(tmp_path).endswith(
        "run `python -m tests.support.malformed_requests --output docs/results/robustness/http.json`."
    )
    (tmp_path / "robustness").mkdir()
    tables = {"input.json": damaged, "http.json": malformed, "kills.json": kills}
    for name, read in tables.items():
        (tmp_path / "robustness" / name).write_text("{")
        with pytest.raises(DataError, match=f"{name}: not a readable record"):
            read(tmp_path)
