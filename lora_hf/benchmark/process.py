"""The parent's end of a side: starts its process, gives it its turns, and tells why it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_hf.benchmark.work import Work
from lora_hf.errors import ConfigError, TrainingError

COMMAND = (sys.executable, "-m", "lora_hf.benchmark.worker")
PACKAGE_PARENT = Path(__file__).parents[2]
TAIL = 12  # lines of standard error that tell why a process died


class SideProcess:
    """A worker process, built and waiting for its first round.

    Raises, here and in every method:
        ConfigError: what the side itself says is wrong.
        TrainingError: its process ended early; with the end of its standard error.
    """

    def __init__(self, work: Work, command: tuple[str, ...] = COMMAND) -> None:
        self.side = work.side
        # A file and not a pipe: nobody reads it while the process runs, and a full pipe would stop it.
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until stop
        paths = (str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", ""))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        try:
            self._send(work.to_line())
            self.ready: dict[str, Any] = self._receive("ready")
        except BaseException:
            self.stop()
            raise

    def run_round(self) -> dict[str, Any]:
        """Lets the side work for a round; what it measured."""
        self._send("go")
        return self._receive("round")

    def finish(self) -> dict[str, Any]:
        """What it tells after its last round."""
        return self._receive("done")

    def stop(self) -> None:
        """Ends the process, at whatever it is."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; reading its answer tells why

    def _receive(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise TrainingError(self._why())
        message = json.loads(line)
        if "error" in message:
            raise ConfigError(f"benchmark: {self.side}: {message['error']}")
        return message[key]

    def _why(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()][-TAIL:]
        said = f"killed by signal {-code}, which for 9 mostly means that memory ran out" if code < 0 else f"exit {code}"
        return "\n  ".join([f"benchmark: the process of {self.side} ended early ({said})", *lines])
