from __future__ import annotations

import pytest

from lora_hf.core import progress
from lora_hf.core.progress import PROGRESS_INTERVAL, ProgressTimer


def test_a_report_is_due_once_per_interval_and_extrapolates_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    timer = ProgressTimer()
    assert not timer.is_due()
    now += PROGRESS_INTERVAL
    assert timer.is_due()
    assert not timer.is_due()
    now += 90.0
    assert timer.is_due()
    assert timer.time_left(done=2, remaining=3) == "3.0 min left"
