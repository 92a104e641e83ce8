"""Child processes end with the code that started them, wherever it is interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lora_hf.core import child_process
from lora_hf.core.child_process import ChildProcesses
from lora_hf.core.errors import Interrupted
from tests.support.processes import processes_with
from tests.support.waiting import LIMIT, wait_until

SLEEP = ["sleep", "600"]
PARENT = """
import sys, time
from lora_hf.core.child_process import ChildProcesses
with ChildProcesses() as children:
    print("ready", flush=True)
    for _ in range(3):
        children.start([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]])
    print("started", flush=True)
    time.sleep(600)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.full
@linux
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_is_stopped_at_a_random_moment_leaves_no_child(kind: signal.Signals, tmp_path: Path) -> None:
    draw = random.Random(int(kind))
    for _ in range(15):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.3))
        parent.send_signal(kind)
        parent.communicate(timeout=LIMIT)
        assert parent.returncode != 0
        if kind == signal.SIGKILL:  # the kernel ends the children on its own time
            wait_until(lambda: not processes_with(str(tmp_path)))
        assert not processes_with(str(tmp_path))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[Any]]:
    """Every process that is started, known from before `Popen` returns."""
    processes: list[subprocess.Popen[Any]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            processes.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(child_process.subprocess, "Popen", Recorded)
    return processes


def interrupt_at(instruction: int) -> bool:
    """Starts a child and sends SIGTERM to this process at that bytecode instruction of the file, if it has so many."""
    handler, count, sent = signal.getsignal(signal.SIGTERM), 0, False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count, sent
        if frame.f_code.co_filename != child_process.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and signal.getsignal(signal.SIGTERM) is not handler:
            count += 1
            if count == instruction and not sent:
                sent = True
                os.kill(os.getpid(), signal.SIGTERM)
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 decides in `settrace` whether there are opcode events
    sys.settrace(trace)
    try:
        with ChildProcesses() as children:
            children.start(SLEEP)
    except Interrupted:
        assert sent
    else:
        assert not sent
    finally:
        sys.settrace(before)
    return sent


def test_a_signal_at_any_instruction_leaves_no_child(
    started: list[subprocess.Popen[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "POLL", 0.001)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    instruction = 1
    while interrupt_at(instruction):
        assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
        for process in started:
            with pytest.raises(ProcessLookupError):
                os.kill(process.pid, 0)
        started.clear()
        instruction += 1
    assert instruction > 100


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path: Path) -> None:
    stubborn = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "if child: pathlib.Path(sys.argv[1]).write_text(str(child))\n"
        "time.sleep(600)"
    )
    file = tmp_path / "grandchild"
    with ChildProcesses(grace=0.1) as children:
        child = children.start([sys.executable, "-c", stubborn, str(file)])
        wait_until(lambda: file.exists() and file.read_text())
    assert child.returncode == -signal.SIGKILL
    grandchild = Path(f"/proc/{file.read_text()}/stat")
    if sys.platform == "linux":
        wait_until(lambda: not grandchild.exists() or ") Z " in grandchild.read_text())


def test_a_second_signal_cuts_the_grace_period_short(tmp_path: Path) -> None:
    stubborn = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(sys.argv[1]).write_text('again'))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    parent = (
        "import subprocess, sys, time; from lora_hf.core.child_process import ChildProcesses\n"
        "with ChildProcesses(grace=600) as children:\n"
        "    child = children.start([sys.executable, '-c', *sys.argv[1:]], stdout=subprocess.PIPE)\n"
        "    print(child.stdout.readline().decode(), flush=True)\n"
        "    time.sleep(600)"
    )
    file = tmp_path / "first"
    process = subprocess.Popen(
        [sys.executable, "-c", parent, stubborn, str(file)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    wait_until(file.exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0


def test_a_command_keeps_its_streams_environment_and_exit_code() -> None:
    with ChildProcesses() as children:
        command = [sys.executable, "-c", "import os, sys; print(os.environ['X'], input()); sys.exit(7)"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        child = children.start(command, env={**os.environ, "X": "y"}, **pipes)
        assert child.communicate("z\n", timeout=LIMIT) == ("y z\n", None)
        assert child.returncode == 7


def test_an_error_in_the_block_ends_the_children() -> None:
    with suppress(ZeroDivisionError), ChildProcesses() as children:
        child = children.start(SLEEP)
        raise ZeroDivisionError
    assert child.returncode == -signal.SIGTERM


def test_sigint_reaches_a_child_of_a_process_that_ignores_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ChildProcesses() as children:
            command = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
            child = children.start([sys.executable, "-c", command], stdout=subprocess.PIPE)
            assert child.communicate(timeout=LIMIT)[0] == b"True\n"
    finally:
        signal.signal(signal.SIGINT, before)
