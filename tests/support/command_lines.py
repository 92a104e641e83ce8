"""Runs command lines in a new process (`run`) or in this one (`ask`).

A new process takes seconds to load torch. Use it only to test the two output streams, the imports, or how it ends.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_hf.cli.main import main
from tests.support.waiting import LIMIT

REPO = Path(__file__).parents[2]


def run(verb: str, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs `python scripts/<verb>.py`."""
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts" / f"{verb}.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def ask(verb: str, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs `main` in this process."""
    given, out, err = [*map(str, words)], io.StringIO(), io.StringIO()
    logs = logging.StreamHandler(err)  # as `main` adds it, but not where pytest has added one
    logging.getLogger().addHandler(logs)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(given, verb=verb)
    finally:
        logging.getLogger().removeHandler(logs)
    assert status == code, err.getvalue()
    return subprocess.CompletedProcess([verb, *given], status, out.getvalue(), err.getvalue())


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])
