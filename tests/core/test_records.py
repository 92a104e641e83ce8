from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest

from lora_hf.core import records
from lora_hf.core.errors import DataError
from lora_hf.core.provenance import cpuinfo, git_state, machine, peak_rss, versions
from lora_hf.core.records import RunRecord


def record(**values: object) -> RunRecord:
    known = {"task": "sst2", "method": "lora", "model": "m", "config": {}, "seed": 0, "started": "2026-01-01T00:00:00"}
    return RunRecord(**(known | values))  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    written = record(metrics={"validation": {"accuracy": 0.75}}, warnings=["câu"], versions=versions(), git=git_state())
    assert RunRecord.load(written.save(tmp_path)) == written
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"task": "sst2"}', "half"])
def test_what_is_no_record_is_named(content: str, tmp_path: Path) -> None:
    path = record().save(tmp_path)
    path.write_text(content if content != "half" else path.read_text()[:-20])
    with pytest.raises(DataError, match=r"record\.json: not a"):
        RunRecord.load(path)


def test_an_unknown_key_is_not_a_record_of_this_version(tmp_path: Path) -> None:
    path = record().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
    with pytest.raises(DataError, match="not a run record"):
        RunRecord.load(path)


def test_a_changed_checkout_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "lora_hf" / "records.py"
    code.parent.mkdir()
    code.write_text("first")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(code))
    assert git_state()["changed"] is False
    (tmp_path / "notes.md").write_text("not code")
    assert git_state()["changed"] is False
    code.write_text("second")
    assert git_state()["changed"] is True


def test_the_surroundings_are_told_without_naming_the_machine() -> None:
    assert versions()["torch"] != "not installed"
    assert machine()["cores"] >= 1
    assert peak_rss() > 1_000_000
    assert not {"hostname", "user", "node"} & machine().keys()


def test_the_processor_is_read_from_what_linux_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = tmp_path / "cpuinfo"
    said.write_text("cpu\t: 0\nmodel name\t: Some: Core\nflags\t\t: fpu avx2\nvmx flags\t: other\nflags\t: second\n")
    monkeypatch.setattr(records, "CPUINFO", said)
    assert [cpuinfo(field) for field in ("model name", "flags", "model", "bugs")] == ["Some: Core", "fpu avx2", "", ""]
    assert machine()["processor"] == "Some: Core"
    monkeypatch.setattr(records, "CPUINFO", tmp_path / "nothing")
    assert cpuinfo("flags") == ""
    assert machine()["processor"] == platform.processor(), "another system"
