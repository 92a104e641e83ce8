"""What a verb says of how far it is where nobody sees a bar."""

from __future__ import annotations

import pytest

from lora_hf.cli import terminal as output
from lora_hf.cli.terminal import PAUSE, progress


def test_a_line_now_and_then_and_every_item(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    seen = []
    for item in progress(iter("abcde"), total=5):
        seen.append(item)
        now += PAUSE / 2
    assert seen == list("abcde")
    assert capsys.readouterr().err == "2 of 5: 0.8 min left\n4 of 5: 0.2 min left\n"
    assert list(progress(range(0, 6, 2))) == [0, 2, 4]
    assert capsys.readouterr() == ("", "")
