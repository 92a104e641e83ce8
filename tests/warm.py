"""Runs the commands of a page in a real shell without the seconds that importing torch takes each time.

A process that has imported everything waits at a socket. The `python` and `lora-hf` that the shell finds hand it their
words, folder, environment and open files, and it forks: the fork is that command. So pipes, variables, quotes and exit
codes are the shell's own. Linux only.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
LONGEST = 60  # seconds that a block may take
ROWS = 48  # of an embedded task: pages show commands, not scores
# What keeps a command small, and does not stand on the page.
SMALL = {
    "train": ["train.max_steps=2"],
    "sweep": ["--trials", "1", "train.max_steps=2"],
}

CLIENT = f"""#!{sys.executable} -IS
import http.client, json, os, signal, socket, sys, time
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
serves = any(os.path.basename(word) in ("serve.py", "serve") for word in words[:2])
files = [0, 1, 2]
if serves:  # until the page ends; the shell goes on when it answers
    if os.path.exists("server.pid"):
        os.kill(int(open("server.pid").read()), signal.SIGKILL)
    words += ["--port", os.environ["PAGE_PORT"]]
    log = os.open("server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    files = [0, log, log]
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect(os.environ["WARM_SOCKET"])
asked = {{"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(door, [json.dumps(asked).encode()], files)
if serves:
    open("server.pid", "w").write(door.recv(100).decode())
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
door.recv(100)
code = door.recv(100)
sys.exit(int(code) if code else 139)
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
            [sys.executable, "-m", "tests.warm", str(self.socket)],
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


def serve(path: str) -> None:
    """Forks for each caller until standard input closes."""
    _import_everything()
    _cut_rows()
    _warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(path)
        door.listen()
        print("ready", flush=True)
        while True:
            waiting, _, _ = select.select([door, sys.stdin], [], [])
            if sys.stdin in waiting:
                return
            caller, _ = door.accept()
            with caller:
                message, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
                if os.fork() == 0:
                    door.close()
                    _answer(caller, json.loads(message), files)
                for file in files:
                    os.close(file)


def _answer(caller: socket.socket, asked: dict[str, Any], files: list[int]) -> None:
    """Is the command, in the fork, and does not come back."""
    code = 1
    try:
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
        code = _exit_code(asked["words"])
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


def _exit_code(words: list[str]) -> int:
    try:
        return _run(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1


def _run(words: list[str]) -> int:
    """What `python` and `lora-hf` do with these words, and with those that keep them small."""
    import runpy

    from lora_hf.cli import main

    program, first, rest = words[0], words[1] if len(words) > 1 else "-", words[2:]
    if program == "lora-hf":
        return main([first, *rest, *SMALL.get(first, ())])
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return 0
    if first in ("-c", "-"):
        sys.argv = words[1:]
        exec(rest[0] if first == "-c" else sys.stdin.read(), {"__name__": "__main__"})
        return 0
    verb = Path(first).stem if Path(first).parent == Path("scripts") else ""
    sys.argv = [first, *rest, *SMALL.get(verb, ())]
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

    from lora_hf.config import ModelConfig
    from lora_hf.models import load_base, load_tokenizer
    from lora_hf.precision import bf16_gain
    from lora_hf.tasks.table import get_task

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
    from lora_hf.tasks.sources import Embedded

    read = Embedded.read

    def few(self: Embedded, split: str, data_dir: str | None) -> tuple[Any, str]:
        rows, where = read(self, split, data_dir)
        return rows.select(range(min(ROWS, len(rows)))), where

    Embedded.read = few  # type: ignore[method-assign]


if __name__ == "__main__":
    serve(sys.argv[1])
