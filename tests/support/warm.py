"""Starts commands without the seconds that importing torch takes each time.

A process that has imported everything waits at a socket. The `python` and `lora-hf` that a shell or a test starts hand
it their words, folder, environment and open files, and it forks: the fork is that command. So pipes, variables, quotes
and exit codes are the real ones, and a signal to the command reaches the fork. Linux only.

For the pages it is a process of its own (`Warm`), whose commands have few rows; elsewhere a fork of the tests' process
(`forking_python`), whose commands are what they always are.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.cpu import renew_thread_pool

REPO = Path(__file__).parents[2]
LONGEST = 60  # seconds that a block may take
ROWS = 48  # of an embedded task: pages show commands, not scores
# What keeps a page's command small, and does not stand on the page.
SMALL = {
    "train": ["train.max_steps=2"],
    "sweep": ["--trials", "1", "train.max_steps=2"],
}

CLIENT = f"""#!{sys.executable} -IS
import http.client, json, os, signal, socket, sys, time
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
serves = "PAGE_PORT" in os.environ and any(os.path.basename(word) in ("serve.py", "serve") for word in words[:2])
files = [0, 1, 2]
if serves:  # until the page ends; the shell goes on when it answers
    if os.path.exists("server.pid"):
        try:
            os.kill(int(open("server.pid").read()), signal.SIGKILL)
            while True:  # until it is gone, and its port free
                socket.create_connection(("127.0.0.1", int(os.environ["PAGE_PORT"])), 5).close()
                time.sleep(0.05)
        except OSError:
            pass
    words += ["--port", os.environ["PAGE_PORT"]]
    log = os.open("server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    files = [0, log, log]
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect(os.environ["WARM_SOCKET"])
asked = {{"words": words, "folder": os.getcwd(), "environment": dict(os.environ), "outlives": serves}}
socket.send_fds(door, [json.dumps(asked).encode()], files)
pid = door.recv(100).decode()
if serves:
    open("server.pid", "w").write(pid)
    door.setblocking(False)
    while True:
        try:
            ended = door.recv(100)
            sys.exit(open("server.log").read())
        except BlockingIOError:
            pass
        try:
            asking = http.client.HTTPConnection("127.0.0.1", int(os.environ["PAGE_PORT"]), timeout=5)
            asking.request("GET", "/readyz")
            if asking.getresponse().status != 503:
                sys.exit(0)
        except OSError:
            pass
        time.sleep(0.05)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(int(pid), number))
code = door.recv(100)
if not code:  # it was killed
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""
CURL = """#!/usr/bin/env bash
exec {curl} --fail-with-body "${{@//localhost:8000/localhost:$PAGE_PORT}}"
"""
REFUSED = """#!/usr/bin/env bash
echo "a page's block that calls $(basename "$0") is not run: give it a comment <!-- not run: REASON -->" >&2
exit 99
"""


class Warm:
    """The waiting process; `folder` is for its socket and for the commands that shells find."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.socket = folder / "socket"
        self.commands = folder / "commands"
        self.commands.mkdir()
        curl = shutil.which("curl")
        texts = {"python": CLIENT, "lora-hf": CLIENT, **dict.fromkeys(("pip", "make", "vllm"), REFUSED)}
        for name, text in {**texts, **({"curl": CURL.format(curl=curl)} if curl else {})}.items():
            (self.commands / name).write_text(text, encoding="utf-8")
            (self.commands / name).chmod(0o755)
        self.environment = {
            **os.environ,
            **environment,
            "PATH": f"{self.commands}:/usr/bin:/bin",
            "WARM_SOCKET": str(self.socket),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm", str(self.socket)],
            cwd=REPO,
            env={**self.environment, "PATH": os.environ["PATH"], "PYTHONPATH": str(REPO)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """Ends the waiting process, at once: what it has imported takes seconds to tidy up."""
        self.process.kill()
        self.process.communicate()

    def shell(self, text: str, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
        """Runs a block of bash; the first command that fails ends it."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env={**self.environment, "PAGE_PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
        )

    @contextmanager
    def session(self, folder: Path) -> Iterator[Session]:
        """A fork that runs Python blocks one after the other under the same names."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.connect(str(self.socket))
            with (folder / "python.log").open("w") as log:
                asked = {"session": True, "folder": str(folder), "environment": self.environment}
                socket.send_fds(door, [json.dumps(asked).encode()], [0, log.fileno(), log.fileno()])
            door.settimeout(LONGEST)
            pid = int(door.recv(100))
            try:
                yield Session(door, folder / "python.log")
            finally:
                os.kill(pid, signal.SIGKILL)


class Session:
    """The names that a page's Python blocks share."""

    def __init__(self, door: socket.socket, log: Path) -> None:
        self.door, self.log = door, log

    def run(self, text: str, name: str, line: int = 0) -> tuple[bool, str]:
        """Whether the block ran, and all that the session put out so far."""
        self.door.send(json.dumps({"text": "\n" * line + text, "name": name}).encode())
        ran = self.door.recv(100)
        return ran == b"0", self.log.read_text(encoding="utf-8")


@contextmanager
def forking_python(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A `python` whose processes are forks of this one as it is now, and the socket, for `WARM_SOCKET`."""
    _import_everything()
    python, path = folder / "python", folder / "socket"
    python.write_text(CLIENT, encoding="utf-8")
    python.chmod(0o755)
    held_open, ours = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(path))
        door.listen()
        with warnings.catch_warnings():  # Python 3.12 warns of threads: pytest's, which the fork does not need
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.close(ours)
            sys.executable = str(python)
            try:
                _forget_the_tests()
                _serve(door, held_open, {})
            finally:
                os._exit(0)
    os.close(held_open)
    try:
        yield python, path
    finally:
        os.close(ours)
        os.waitpid(pid, 0)


def _forget_the_tests() -> None:
    """What pytest has changed in a process, as an interpreter begins."""
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    logging.getLogger().handlers.clear()
    logging.getLogger().setLevel(logging.WARNING)
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # where a test trained, it is that of one process
    GradientState._reset_state()


def _serve_pages(path: str) -> None:
    """Forks for each caller until standard input closes."""
    _import_everything()
    _cut_rows()
    _warm_up()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(path)
        door.listen()
        print("ready", flush=True)
        _serve(door, 0, SMALL)


def _serve(door: socket.socket, until_closed: int, small: Mapping[str, list[str]]) -> None:
    """Forks for each caller."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        waiting, _, _ = select.select([door, until_closed], [], [])
        if until_closed in waiting:
            return
        caller, _ = door.accept()
        with caller:
            message, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
            if os.fork() == 0:
                door.close()
                os.close(until_closed)
                _answer(caller, json.loads(message), files, small)
            for file in files:
                os.close(file)


def _end_with(caller: socket.socket) -> None:
    """A command that was killed is over: its fork as well."""
    caller.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _answer(caller: socket.socket, asked: dict[str, Any], files: list[int], small: Mapping[str, list[str]]) -> None:
    """Is the command, in the fork, and does not come back."""
    code = 1
    try:
        renew_thread_pool()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for target, file in enumerate(files):
            os.dup2(file, target)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        caller.send(str(os.getpid()).encode())
        if asked.get("session"):
            _session(caller)
        elif not asked["outlives"]:
            threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
        code = _exit_code(asked["words"], small)
        sys.stdout.flush()
        caller.send(str(code).encode())
    except BaseException:  # noqa: BLE001 - a fork must never fall back into the loop of its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _session(caller: socket.socket) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    while message := caller.recv(1 << 20):
        block = json.loads(message)
        try:
            exec(compile(block["text"], block["name"], "exec"), names)
            code = 0
        except BaseException:  # noqa: BLE001 - what a block raises is told to the page's test
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        caller.send(str(code).encode())


def _exit_code(words: list[str], small: Mapping[str, list[str]]) -> int:
    try:
        return _run(words, small)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1


def _run(words: list[str], small: Mapping[str, list[str]]) -> int:
    """What `python` and `lora-hf` do with these words, and with those that keep them small."""
    import runpy

    from lora_hf.cli.main import main

    program, *words = words
    while words and words[0].startswith(("-u", "-X")):  # the interpreter's own
        words = words[1:]
    first, rest = words[0] if words else "-", words[1:]
    if program == "lora-hf":
        return main([first, *rest, *small.get(first, ())])
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return 0
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
        return 0
    if first == "-":
        sys.argv = [first, *rest]
        exec(sys.stdin.read(), {"__name__": "__main__"})
        return 0
    verb = Path(first).stem if Path(first).parent == Path("scripts") else ""
    sys.argv = [first, *rest, *small.get(verb, ())]
    runpy.run_path(first, run_name="__main__")
    return 0


def _import_everything() -> None:
    import importlib

    modules = ["accelerate", "datasets", "evaluate", "matplotlib.pyplot", "peft", "sklearn.metrics", "torch"]
    modules += ["scipy.stats", "transformers", "transformers.trainer"]
    for room in sorted((REPO / "lora_hf").rglob("*.py")):
        module = ".".join(room.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        if not module.startswith(("lora_hf.serving.playground", "lora_hf.sweep")):
            modules.append(module)
    for module in modules:
        importlib.import_module(module)


def _warm_up() -> None:
    """What each command would do first: compile expressions, find fonts, and look through all that is imported."""
    import gc
    import io

    from matplotlib import pyplot

    from lora_hf.core.config.schema import ModelConfig
    from lora_hf.data.tasks.registry import get_task
    from lora_hf.lora.precision import bf16_gain
    from lora_hf.models.load import load_base, load_tokenizer

    for base, task in (("tiny-roberta", "rule-sentiment"), ("tiny-gpt2", "rule-restaurants")):
        model = ModelConfig(name=base, precision="fp32")
        load_base(model, get_task(task))
        load_tokenizer(model)
    bf16_gain()
    figure, axes = pyplot.subplots()
    axes.set(xlabel="epoch", title="Loss")
    figure.savefig(io.BytesIO())
    pyplot.close(figure)
    gc.collect()
    gc.freeze()


def _cut_rows() -> None:
    from lora_hf.data.tasks.sources import Embedded

    read = Embedded.read

    def few(self: Embedded, split: str, data_dir: str | None) -> tuple[Any, str]:
        rows, where = read(self, split, data_dir)
        return rows.select(range(min(ROWS, len(rows)))), where

    Embedded.read = few  # type: ignore[method-assign]


if __name__ == "__main__":
    _serve_pages(sys.argv[1])
