"""The Python of docs/adapters.md runs as it stands there, block after block, and so do its last commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lora_hf.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/adapters.md", "exec"), names)
    assert "left out by rank 4" in capsys.readouterr().out
    commands = blocks("bash")[-1].splitlines()
    for command in commands:
        script, *words = shlex.split(command)[1:]
        assert main(words, verb=Path(script).stem) == 0, capsys.readouterr().err
        assert main(["merge", "--adapter", words[-1], "--output", f"merged-{words[-1]}"]) == 0
    assert len(commands) == 3
