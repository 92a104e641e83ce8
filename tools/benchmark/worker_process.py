"""Both ends of the pipes to a worker process, which exchange lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Any, TextIO

from lora_hf.core.child_process import ChildProcesses, package_environment
from lora_hf.core.errors import ConfigError, TrainingError
from tools.benchmark.job import Job

MODULE = "tools.benchmark.worker"
STDERR_LINES = 12  # how much of standard error goes into the error message


class Channel:
    """The end of the child: its two pipes to the parent."""

    def __init__(self, incoming: TextIO, outgoing: TextIO) -> None:
        self.incoming, self.outgoing = incoming, outgoing

    @classmethod
    def standard(cls) -> Channel:
        """Uses standard input and output. What libraries print goes to standard error instead."""
        outgoing = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return cls(sys.stdin, outgoing)

    def send(self, **message: Any) -> None:
        self.outgoing.write(json.dumps(message) + "\n")
        self.outgoing.flush()

    def receive(self) -> str:
        """Waits for the next line of the parent. Ends this process if the parent has gone."""
        line = self.incoming.readline()
        if not line:
            raise SystemExit(0)
        return line


class ChildProcess:
    """The end of the parent: a process, one of `children`, that gets its first line at once.

    Every method raises:
        ConfigError: the child reports an error of the user.
        TrainingError: the process ended early. The message holds its exit code and the end of its standard error.
    """

    def __init__(self, children: ChildProcesses, side: str, first_line: str, *command: str) -> None:
        self.side = side
        # A file, because nothing reads it while the process runs, and a full pipe would block the process.
        self.stderr = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until close
        self.process = children.start(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            encoding="utf-8",
            env=package_environment(),
        )
        self._send(first_line)

    def finish(self) -> dict[str, Any]:
        """Waits for the last message."""
        return self._receive("done")

    def close(self) -> None:
        """Closes the pipes; `children` ends the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for file in (self.process.stdin, self.process.stdout, self.stderr):
            with suppress(BrokenPipeError):  # the process has died before it has read everything
                file.close()

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has died, and `_receive` says why

    def _receive(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise TrainingError(self._early_exit())
        message = json.loads(line)
        if "error" in message:
            raise ConfigError(f"benchmark: {self.side}: {message['error']}")
        return message[key]

    def _early_exit(self) -> str:
        code = self.process.wait()
        self.stderr.seek(0)
        lines = [line for line in self.stderr.read().splitlines() if line.strip()][-STDERR_LINES:]
        reason = f"killed by signal {-code}; signal 9 usually means out of memory" if code < 0 else f"exit code {code}"
        return "\n  ".join([f"benchmark: the process of {self.side} ended early ({reason})", *lines])


class WorkerProcess(ChildProcess):
    """A worker that has built its side and waits for the first round. Raises like `ChildProcess`."""

    def __init__(self, children: ChildProcesses, job: Job, command: tuple[str, ...] | None = None) -> None:
        super().__init__(children, job.side, job.to_line(), *(command or (sys.executable, "-m", MODULE)))
        try:
            self.ready: dict[str, Any] = self._receive("ready")
        except BaseException:
            self.close()
            raise

    def run_round(self) -> dict[str, Any]:
        """Runs one round and returns what the worker measured."""
        self._send("go")
        return self._receive("round")
