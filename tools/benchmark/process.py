"""Both ends of the pipes to a process of ours: it is told and tells lines of JSON, and why it stopped is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any, TextIO

from lora_hf.core.child_process import package_environment
from lora_hf.core.errors import ConfigError, TrainingError
from tools.benchmark.work import Work

MODULE = "tools.benchmark.worker"
TAIL = 12  # lines of standard error that tell why a process died


class Channel:
    """The child's end: the two pipes to the parent."""

    def __init__(self, lines: TextIO, out: TextIO) -> None:
        self.lines, self.out = lines, out

    @classmethod
    def standard(cls) -> Channel:
        """Through standard input and output; whatever a library prints goes to standard error instead."""
        out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return cls(sys.stdin, out)

    def tell(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def wait(self) -> str:
        """The parent's next line; where it has gone, so does this process."""
        line = self.lines.readline()
        if not line:
            raise SystemExit(0)
        return line


class Child:
    """The parent's end: a process that is told an order at once.

    Raises, here and in every method:
        ConfigError: what the side itself says is wrong.
        TrainingError: its process ended early; with the end of its standard error.
    """

    def __init__(self, side: str, order: str, *command: str) -> None:
        self.side = side
        # A file and not a pipe: nobody reads it while the process runs, and a full pipe would stop it.
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until stop
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env=package_environment(),
        )
        self._send(order)

    def finish(self) -> dict[str, Any]:
        """What it tells at its end."""
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


class SideProcess(Child):
    """A worker process, built and waiting for its first round; raises as `Child`."""

    def __init__(self, work: Work, command: tuple[str, ...] | None = None) -> None:
        super().__init__(work.side, work.to_line(), *(command or (sys.executable, "-m", MODULE)))
        try:
            self.ready: dict[str, Any] = self._receive("ready")
        except BaseException:
            self.stop()
            raise

    def run_round(self) -> dict[str, Any]:
        """Lets the side work for a round; what it measured."""
        self._send("go")
        return self._receive("round")
