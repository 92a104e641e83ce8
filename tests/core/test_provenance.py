from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from lora_hf.core import provenance
from lora_hf.core.provenance import cpuinfo, git_state, machine, peak_rss, versions


def test_git_state_sees_uncommitted_changes_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "lora_hf" / "core" / "provenance.py"
    code.parent.mkdir(parents=True)
    code.write_text("first")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert git_state()["changed"] is False
    (tmp_path / "notes.md").write_text("not code")
    assert git_state()["changed"] is False
    code.write_text("second")
    assert git_state()["changed"] is True


def test_the_commit_of_another_project_is_not_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment within the user's own checkout holds the package."""
    code = tmp_path / ".venv" / "lora_hf" / "core" / "provenance.py"
    code.parent.mkdir(parents=True)
    code.write_text("installed")
    (tmp_path / ".gitignore").write_text(".venv\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert git_state() == {}


def test_provenance_does_not_name_the_machine() -> None:
    assert versions()["torch"] != "not installed"
    assert machine()["cores"] >= 1
    assert peak_rss() > 1_000_000
    assert not {"hostname", "user", "node"} & machine().keys()


def test_the_processor_comes_from_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu_file = tmp_path / "cpuinfo"
    cpu_file.write_text("cpu\t: 0\nmodel name\t: A: B\nflags\t\t: fpu avx2\nvmx flags\t: other\nflags\t: second\n")
    monkeypatch.setattr(provenance, "CPUINFO", cpu_file)
    assert [cpuinfo(field) for field in ("model name", "flags", "model", "bugs")] == ["A: B", "fpu avx2", "", ""]
    assert machine()["processor"] == "A: B"
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "nothing")
    assert cpuinfo("flags") == ""
    assert machine()["processor"] == platform.processor(), "another system"
