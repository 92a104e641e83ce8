"""Child processes that never outlive the code that starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lora_hf.core.errors import Interrupted

GRACE = 10.0  # seconds that a child gets to end after SIGTERM, before SIGKILL
POLL = 0.02  # seconds between two checks whether a child has ended
PYTHON = sys.executable

# Each child starts as this program and then becomes the command. Linux kills it as soon as its parent is dead, even by
# SIGKILL; a parent that died before `prctl` is no longer the parent. The command gets default signal handling, also
# where this process ignores SIGINT because a shell started it in the background.
BOOTSTRAP = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def package_command(*words: str) -> list[str]:
    """Returns the command that runs `lora-hf` with these words in a child process, installed or not."""
    return [PYTHON, "-c", "import sys; from lora_hf.cli.main import main; sys.exit(main())", *words]


def package_environment() -> dict[str, str]:
    """Returns an environment in which a child process imports this copy of the package, installed or not."""
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


class ChildProcesses:
    """Starts child processes in a `with` block and ends all of them when the block ends, whatever ends it.

    The first SIGINT or SIGTERM ends the children and raises `Interrupted` in the block, but never while a child is
    being started, so no child is lost. Each child gets SIGTERM, up to `grace` seconds, and then SIGKILL for its process
    group. Another signal ends the wait.

    On Linux the children also die when this process is killed or crashes. Python handles signals in the main thread
    only: a block in another thread does not change what they do.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self._children: list[subprocess.Popen[Any]] = []
        self._signals: list[signal.Signals] = []
        self._raised = False
        self._deferred = True  # until the child that is being started is known
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> ChildProcesses:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(kind) is not signal.SIG_IGN:
                    self._previous_handlers[kind] = signal.signal(kind, self._on_signal)
        self._deferred = False
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command in a process group of its own, out of reach of the terminal's Ctrl-C.

        Args:
            options: of `subprocess.Popen`.

        Raises:
            Interrupted: a signal came in the meantime.
        """
        self._deferred = True
        try:
            words = [PYTHON, "-I", "-S", "-c", BOOTSTRAP, str(os.getpid()), *command]
            child = subprocess.Popen(words, start_new_session=True, **options)
            self._children.append(child)
        finally:
            self._deferred = False
        if self._signals and not self._raised:
            self._finish()
        return child

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(signal.Signals(number))
        if not self._deferred:
            self._finish()

    def _finish(self) -> None:
        self._deferred = True
        self._end_all(len(self._signals))
        # SIGINT last: its usual handler may raise here.
        for kind, handler in reversed(self._previous_handlers.items()):
            signal.signal(kind, handler)
        if self._signals and not self._raised:
            self._raised = True
            raise Interrupted(self._signals[0], "its child processes were stopped")

    def _end_all(self, signals: int) -> None:
        """Ends the children; any signal after the first `signals` ends the wait for them."""
        running = [child for child in self._children if not _has_ended(child)]
        for child in running:
            os.kill(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.grace
        while running:
            expired = time.monotonic() > deadline or len(self._signals) > signals
            for child in [child for child in running if _has_ended(child) or expired]:
                with suppress(ProcessLookupError, PermissionError):  # the group is empty
                    os.killpg(child.pid, signal.SIGKILL)
                _has_ended(child, wait=True)
                running.remove(child)
            time.sleep(POLL)


def _has_ended(child: subprocess.Popen[Any], wait: bool = False) -> bool:
    """As `Popen.poll` and `Popen.wait`, whose lock may still be held by a call that a signal interrupted."""
    if child.returncode is None:
        try:
            pid, status = os.waitpid(child.pid, 0 if wait else os.WNOHANG)
        except ChildProcessError:  # the interrupted call has reaped it
            pid, status = child.pid, 0
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode is not None
