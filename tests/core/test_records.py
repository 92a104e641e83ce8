from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_hf.core.errors import DataError
from lora_hf.core.provenance import git_state, versions
from lora_hf.core.records import RunRecord


def record(**values: object) -> RunRecord:
    known = {"task": "sst2", "method": "lora", "model": "m", "config": {}, "seed": 0, "started": "2026-01-01T00:00:00"}
    return RunRecord(**(known | values))  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(metrics={"validation": {"accuracy": 0.75}}, warnings=["câu"], versions=versions(), git=git_state())
    assert RunRecord.load(written.save(tmp_path)) == written
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"task": "sst2"}', "half"])
def test_a_damaged_record_is_refused(content: str, tmp_path: Path) -> None:
    path = record().save(tmp_path)
    path.write_text(content if content != "half" else path.read_text()[:-20])
    with pytest.raises(DataError, match=r"record\.json: not a"):
        RunRecord.load(path)


def test_a_record_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = record().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
    with pytest.raises(DataError, match="not a run record"):
        RunRecord.load(path)
