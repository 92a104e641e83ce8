"""`chat`: talk to a trained chat model in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_hf.cli.commands.generate import add_decoding, decoding_of
from lora_hf.cli.terminal import add_adapter, add_json, print_json
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.core.imports import heavy_imports

if TYPE_CHECKING:
    from lora_hf.core.config.schema import GenerateConfig
    from lora_hf.data.tasks.chat import ChatTask
    from lora_hf.inference.generate import Generator

HELP = "chat with a model that was trained on conversations"
COMMANDS = "/reset starts a new conversation, /exit ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message of each conversation")
    add_decoding(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.data.tasks.chat import ChatTask

    saved = find_saved_model(options.adapter, options.revision, options.model)
    if not isinstance(saved.task, ChatTask):
        raise ConfigError(
            f"{options.adapter} was trained for {saved.task.name}, not for chat; use {saved.task.verb} instead"
        )
    decoding = decoding_of(options, saved.generate)
    if decoding.num_beams > 1:
        if options.num_beams:
            raise ConfigError(f"num_beams={options.num_beams}: beam search has no text to stream; leave it out")
        decoding = replace(decoding, num_beams=1)
    with heavy_imports():
        import torch

        from lora_hf.inference.generate import Generator

    interactive = sys.stdin.isatty()
    generator = Generator.load(saved)
    torch.manual_seed(decoding.seed)  # once: seeded for each turn, equal turns would get equal replies
    if interactive:
        print(f"{options.adapter} on {saved.model.name}; {COMMANDS}", file=sys.stderr)
    messages = _talk(generator, saved.task, decoding, options.system, interactive)
    if options.json:
        print_json({"messages": messages})


def _talk(
    generator: Generator, task: ChatTask, decoding: GenerateConfig, system: str | None, interactive: bool
) -> list[dict[str, Any]]:
    """Answers each line of standard input, and returns the last conversation."""
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    for line in _lines(interactive):
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        with _explained_interruptions() if interactive else nullcontext():
            reply = generator.reply(task.conversation(asked), decoding, _show)
            print()
            messages = [*asked, {"role": "assistant", "content": reply.text}]
    return messages


@contextmanager
def _explained_interruptions() -> Iterator[None]:
    """Ends a turn without its reply where there is none: Ctrl-C, or a conversation that has become too long."""
    try:
        yield
    except DataError as error:
        print(f"{error}; or start a new conversation with /reset", file=sys.stderr)
    except KeyboardInterrupt:
        print()


def _lines(interactive: bool) -> Iterator[str]:
    """The lines of standard input without their ends."""
    if not interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    with suppress(EOFError):
        while True:
            yield input("> ")
    print()


def _show(text: str) -> None:
    print(text, end="", flush=True)
