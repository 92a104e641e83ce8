"""Runs the blocks of a page in order, in the folder of a reader.

A process of its own runs page after page, as a reader's environment is not that of the tests, and imports torch once.
Commands of the package run in it too, with a few rows and steps; servers run in their own. Python blocks of a page
share their names.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lora_hf.cli.main import main
from lora_hf.core.imports import heavy_imports
from lora_hf.data.metrics import java
from lora_hf.data.metrics.requirements import ScorerError
from lora_hf.data.tasks.sources import Bundled
from tests.support import page_hooks
from tests.support.pages import RUN, Block, blocks
from tests.support.process_state import restored_process_state
from tests.support.server_process import serving

ROWS = 48  # of a bundled task: pages show commands, not scores
# What keeps a page's command small, and does not stand on the page.
SMALL = {
    "train": ["train.max_steps=2", "output.plots=false"],
    "sweep": ["--trials", "1", "train.max_steps=2", "output.plots=false"],
    "lr-find": ["--rates", "1e-4,1e-3", "--steps", "2", "output.plots=false"],
}
COMMAND = re.compile(
    r"(?P<environment>(?:\w+=\S+ )*)"
    r"(?:python scripts/(?P<script>[\w-]+)\.py|lora-hf (?P<verb>[\w-]+))(?: (?P<rest>.*))?"
)
OTHERS = ("cat", "cp", "curl", "echo", "printf", "python")  # programs that blocks may call
OPERATORS = {"|", ">", ">>", "<", ";", "&&", "||", "&"}


class Page:
    """The names of a page's Python blocks, and the address of its server if it has started one."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.server = ExitStack()
        self.address = ""

    def run(self, block: Block) -> None:
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(block), "exec"), self.names)
            return
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip():
                self._run_line(line)

    def _run_line(self, line: str) -> None:
        words = shlex.split(line)
        command = COMMAND.fullmatch(line)
        if command is None or OPERATORS & set(words):
            self._run_in_bash(line)
            return
        verb, rest = command["script"] or command["verb"], shlex.split(command["rest"] or "")
        environment = dict(word.split("=", 1) for word in command["environment"].split())
        if verb == "serve":
            self.server.close()
            _, self.address, _ = self.server.enter_context(serving(*rest, **environment))
            return
        assert not environment, line
        try:
            code = main(_shortened(rest, SMALL.get(verb, ())), verb=verb)
        except SystemExit as end:
            code = end.code  # of argparse
        assert code == 0, f"{line}: exit code {code}"

    def _run_in_bash(self, line: str) -> None:
        program = re.sub(r"^(\w+=\S+ )*", "", line).split()[0]
        assert program in OTHERS, f"{line}: a block that calls {program} needs a comment <!-- not run: REASON -->"
        line = line.replace("localhost:8000", self.address).replace("curl ", "curl --fail-with-body ")
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True, stdin=subprocess.DEVNULL)


def _shortened(words: list[str], small: Sequence[str]) -> list[str]:
    """The words with those of `small`, which replace options of the same name: a command takes each once."""
    kept = list(words)
    for option in (word for word in small if word.startswith("--")):
        if option in kept:
            place = kept.index(option)
            del kept[place : place + 2]
    return [*kept, *small]


def cut_rows() -> None:
    read = Bundled.read

    def few(self: Bundled, split: str, data_dir: str | None) -> tuple[Any, str]:
        rows, where = read(self, split, data_dir)
        return rows.select(range(min(ROWS, len(rows)))), where

    Bundled.read = few  # type: ignore[method-assign]


def leave_meteor_out() -> None:
    """It reads its table for ten seconds at each start; other tests compute it."""

    def refuse(*_: Any) -> float:
        raise ScorerError("left out of the pages")

    java.meteor = refuse


def run_page(file: Path) -> None:
    page, name = Page(), file.stem.lower()
    with page.server:
        getattr(page_hooks, f"before_{name}", lambda names: None)(page.names)
        for block in blocks(file):
            if block.language in RUN and not block.not_run:
                print(f"-- {block}", file=sys.stderr, flush=True)
                page.run(block)
        getattr(page_hooks, f"after_{name}", lambda names: None)(page.names)


def start_reader(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """A process with this environment that runs pages: `submit(run_in_folder, PAGE, FOLDER)`."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with patch.dict(os.environ, {**environment, **path}):  # the libraries read theirs when they are imported
        executor.submit(prepare_reader).result()
    return executor


def prepare_reader() -> None:
    """Imports what nearly every page needs, and leaves out what takes long and is no matter of the pages."""
    with heavy_imports():  # with PEFT, which a page uses
        import lora_hf.inference.classify
        import lora_hf.training.run  # noqa: F401
    cut_rows()
    leave_meteor_out()


def run_in_folder(page: Path, folder: Path) -> None:
    """Runs a page, which leaves nothing behind for the next one.

    What is loaded so far is not looked through for garbage again, which the Trainer starts after each run.

    Raises:
        RuntimeError: a block failed; the message is all output of the page, and the error.
    """
    gc.freeze()
    with tempfile.TemporaryFile("w+") as output, restored_process_state():
        os.chdir(folder)
        try:
            with _output_to(output.fileno()):
                run_page(page)
        except Exception as error:
            output.seek(0)
            raise RuntimeError(output.read() + traceback.format_exc()) from error


@contextmanager
def _output_to(descriptor: int) -> Iterator[None]:
    """Sends what this process and its children print to a file."""
    streams = (sys.stdout, sys.stderr)
    own = [os.dup(stream.fileno()) for stream in streams]
    try:
        for stream in streams:
            os.dup2(descriptor, stream.fileno())
        yield
    finally:
        for stream, copy in zip(streams, own, strict=True):
            stream.flush()
            os.dup2(copy, stream.fileno())
            os.close(copy)
