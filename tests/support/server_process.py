"""`scripts/serve.py` in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import LIMIT

SCRIPT = Path(__file__).parents[2] / "scripts" / "serve.py"


@contextmanager
def serving(*words: str | Path, **environment: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """Starts a server and waits until it is ready: the process, its URL, and its log lines so far."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--port", "0", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "ready: " in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(LIMIT), lines
        url = re.search(r"http://[\d.:]+", "".join(lines))
        assert url, lines
        yield process, url[0], lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
