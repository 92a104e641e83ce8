"""Progress where standard error is not a terminal."""

from __future__ import annotations

import pytest

from lora_hf.cli.terminal import progress
from lora_hf.core import progress as core_progress
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
