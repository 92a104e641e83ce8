"""Progress where standard error is not a terminal, a reader of a pipe that leaves, and paths that cannot be used."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lora_hf.cli.commands.demo import _folder
from lora_hf.cli.main import main
from lora_hf.cli.terminal import progress
from lora_hf.core import progress as core_progress
from lora_hf.core.child_process import package_command, package_environment
from lora_hf.core.config.loader import load_config
from lora_hf.core.progress import PROGRESS_INTERVAL


def test_progress_prints_occasional_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(core_progress.time, "monotonic", lambda: now)
    seen = []
    for item in progress(iter("abcde"), total=5):
        seen.append(item)
        now += PROGRESS_INTERVAL / 2
    assert seen == list("abcde")
    assert capsys.readouterr().err == "2 of 5: 0.8 min left\n4 of 5: 0.2 min left\n"
    assert list(progress(range(0, 6, 2))) == [0, 2, 4]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [["schema"], ["info", "--json"]], ids=["much", "little"])
def test_a_reader_that_leaves_is_no_error(words: list[str]) -> None:
    command = package_command(*words)
    process = subprocess.Popen(command, env=package_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, message = process.communicate()
    assert (process.returncode, message) == (141, b"")


@pytest.mark.parametrize("output", ["missing/schema.json", "file/schema.json", "."])
def test_a_path_that_cannot_be_written_is_one_message(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["schema", "--output", str(tmp_path / output)]) == 2
    assert f"error: --output {tmp_path / output}: cannot be written: " in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["2024", "a: b", "yes", "#1", "ghi chú"])
def test_the_demo_writes_to_a_folder_of_any_name(name: str) -> None:
    assert load_config("rule_sentiment.yaml", _folder("demo", name)).output.dir == name
