"""When a long task reports its progress, and how long it still takes."""

from __future__ import annotations

import time

from lora_hf.core.formatting import minutes

PROGRESS_INTERVAL = 30.0  # seconds between two lines of progress


class ProgressTimer:
    """Starts when it is created."""

    def __init__(self) -> None:
        self.start = self.last_report = time.monotonic()

    def is_due(self) -> bool:
        """Returns True at most once per `PROGRESS_INTERVAL`."""
        now = time.monotonic()
        if now - self.last_report < PROGRESS_INTERVAL:
            return False
        self.last_report = now
        return True

    def time_left(self, done: int, remaining: int) -> str:
        """Extrapolates from the `done` steps since the start, as in "2.5 min left"."""
        return f"{minutes((time.monotonic() - self.start) / done * remaining)} left"
