"""New processes that need not import torch again: a server of the standard library has, and forks them.

They have the environment of the tests. A process that needs another one, or counts its imports, is started anew.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A process that runs the function, which must be importable."""
    process = _context.Process(target=_run, args=(function, *arguments), daemon=True)
    process.start()
    return process


def run(function: Callable[..., None], *arguments: Any) -> None:
    """Runs the function in a new process, and waits for its end."""
    process = start(function, *arguments)
    process.join()
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}; its error is above"


def _run(function: Callable[..., None], *arguments: Any) -> None:
    if sys.platform == "linux":  # ends with the server, which ends with the tests, even if they are killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    function(*arguments)
