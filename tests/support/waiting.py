"""Waits for what another process or thread does. The limit ends a test that hangs, and no slow machine reaches it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

LIMIT = 600.0  # seconds; for every wait of the tests
Value = TypeVar("Value")


def wait_until(condition: Callable[[], Value], interval: float = 0.02) -> Value:
    """Repeats `condition` every `interval` seconds until it is true, and returns its value."""
    deadline = time.monotonic() + LIMIT
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {LIMIT:.0f} seconds in vain"
        time.sleep(interval)
    return value
