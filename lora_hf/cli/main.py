"""Fine-tune Hugging Face models with LoRA: train, evaluate, serve and share adapters.

Results go to standard output, progress and logs to standard error. Exit codes: 0 for success, 2 for an invalid command,
config or input (with one message), 130 and 143 after Ctrl-C and SIGTERM, 141 if the reader of a pipe has left, 1 for a
bug (with a traceback).
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lora_hf.cli.commands import (
    benchmark,
    chat,
    combine,
    compare,
    convert,
    demo,
    evaluate,
    export,
    generate,
    info,
    lr_find,
    merge,
    plan,
    predict,
    push,
    schema,
    score,
    serve,
    sweep,
    train,
)
from lora_hf.core.errors import Interrupted, UserError, did_you_mean
from lora_hf.core.imports import hide_peft
from lora_hf.training.distributed import claim_error_report, rank, require_single_process

# Each has HELP, `add_arguments` and `run`.
VERBS = {
    "train": train,
    "plan": plan,
    "sweep": sweep,
    "lr-find": lr_find,
    "eval": evaluate,
    "predict": predict,
    "generate": generate,
    "chat": chat,
    "score": score,
    "merge": merge,
    "combine": combine,
    "convert": convert,
    "export": export,
    "compare": compare,
    "push": push,
    "serve": serve,
    "benchmark": benchmark,
    "schema": schema,
    "info": info,
    "demo": demo,
}
RERUN = {"sweep": "to continue", "benchmark": "to continue", "demo": "to start over"}  # these have no --resume
NOT_OPTIONS = {"verb", "run", "what", "file", "runs", "overrides", "source", "target"}  # other names in a namespace

# Why a file system refuses a path that a command reads or writes; not ENOENT, which may be a file of our own.
REFUSED = {errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS}
BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None, verb: str | None = None) -> int:
    """Runs one verb, the first argument unless `verb` names it, and returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        hide_peft()
    options = _parse(words if verb is None else [verb, *words], verb)

    def run() -> None:
        if options.verb != "train":
            require_single_process(options.verb)
        options.run(options)

    return exit_code_of(run, options.verb, vars(options).keys() - NOT_OPTIONS, ends_process=arguments is None)


def exit_code_of(run: Callable[[], None], verb: str, options: Iterable[str] = (), ends_process: bool = False) -> int:
    """Runs a command with logs on standard error, prints its error, and returns its exit code.

    Args:
        options: names of the command's options, which its errors then call by their flags.
        ends_process: nothing comes after the command, so that further signals need not stop anything.
    """
    _log_to_standard_error()
    try:
        with _stopped_by_sigterm():
            run()
            sys.stdout.flush()
    except UserError as error:
        message, code = f"error: {with_flags(str(error), options)}", 2
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in REFUSED or error.filename is None:
            raise
        message, code = f"error: {error.filename!s:.200}: {error.strerror}; choose another path", 2
    except Interrupted as stop:
        if ends_process:
            _ignore_signals()
        hint = f"{stop.kind.name}: run the same command again {RERUN[verb]}" if verb in RERUN else str(stop)
        message, code = f"stopped by {with_flags(hint, options)}", stop.code
    except KeyboardInterrupt:
        if ends_process:
            _ignore_signals()
        message, code = "interrupted", 130
    except Exception:
        if claim_error_report():
            raise
        return 1
    else:
        return 0
    if claim_error_report():
        print(message, file=sys.stderr)
    return code


def _reader_has_left() -> bool:
    """Whether the program that standard output is piped to has ended, as head does. Then the rest goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of Python
    return left


def _ignore_signals() -> None:
    """An impatient user presses Ctrl-C several times: the message of the first one is worth more than a traceback."""
    if threading.current_thread() is threading.main_thread():
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Ends the block on SIGTERM as Ctrl-C does, unless it has a handler of its own. Other threads get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number), "run the same command again")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:  # a run that lost its other processes ignores it from there on
            signal.signal(signal.SIGTERM, before)


def with_flags(message: str, options: Iterable[str]) -> str:
    """Writes parameter names in an error of the library as command-line flags.

    `output DIR: ...` becomes `--output DIR: ...`, `overwrite=True` becomes `--overwrite`, and `resume=auto` becomes
    `--resume auto`, if those are options of the command.
    """
    names = "|".join(map(re.escape, options)) or "(?!)"

    def flag(match: re.Match[str]) -> str:
        return f"--{match[1].replace('_', '-')}"

    message = re.sub(rf"\A({names})(?=:| \S+: )", flag, message)
    message = re.sub(rf"(?<![\w.:-])({names})=True\b", flag, message)
    return re.sub(rf"(?<![\w.:-])({names})=(?=\S)", lambda match: f"{flag(match)} ", message)


def _parse(words: list[str], verb: str | None) -> argparse.Namespace:
    """The parsed options. Overrides (`key=value`) may come anywhere among them, which argparse alone does not allow."""
    parser, verbs = _parsers(verb)
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if not words[0].startswith("-") and words[0] not in verbs:
        parser.error(f"unknown verb {words[0]!r}{did_you_mean(words[0], verbs)}; expected one of {', '.join(verbs)}")
    if words[0] in verbs and (file := _config_without_flag(words[1:], verbs[words[0]])):
        verbs[words[0]].error(f"--config is required: did you mean --config {file}?")
    parsed, rest = parser.parse_known_args(words)
    has_overrides = hasattr(parsed, "overrides")
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not has_overrides]
    if unknown:
        hint = _suggest_override(unknown[0], words) if has_overrides else ""
        verbs[parsed.verb].error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


class _StoreOnce(argparse.Action):
    """Refuses an option that is given again: without a word, argparse forgets the first value."""

    given = False

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if self.given and option is not None:
            parser.error(f"{option} is given twice, the second time with {values!r}; give it once")
        self.given = True
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)


def _config_without_flag(words: list[str], parser: argparse.ArgumentParser) -> str:
    """A YAML file given without the `--config` that the verb requires, or an empty string."""
    if "--config" not in parser.format_usage().split() or any(word.startswith("--c") for word in words):
        return ""
    return next((word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word), "")


def _suggest_override(option: str, words: list[str]) -> str:
    """A hint to write `train.lr=1e-3` for `--lr 1e-3`, if a config key has this name."""
    from lora_hf.core.config.hints import find_keys
    from lora_hf.core.config.schema import known_keys

    name, _, value = option.partition("=")
    value = value or next(iter(words[words.index(option) + 1 :]), "VALUE")
    section, dot, key = name.removeprefix("--").replace("-", "_").rpartition(".")
    keys = [full for full in find_keys(key, known_keys()) if full.startswith(section + dot)]
    return f"; did you mean {' or '.join(f'{full}={value}' for full in keys)}?" if keys else ""


def _parsers(verb: str | None) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole command line, and those of the verbs."""
    parser = _Parser(prog="lora-hf" if verb is None else "python scripts", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, command in VERBS.items():
        description = f"{command.HELP[0].upper()}{command.HELP[1:]}."
        prog = None if verb is None else f"python scripts/{name}.py"
        verb_parser = verbs.add_parser(name, prog=prog, help=command.HELP, description=description)
        verb_parser.set_defaults(run=command.run)
        command.add_arguments(verb_parser)
    return parser, verbs.choices


def _log_to_standard_error() -> None:
    """Shows our own messages, and warnings of the libraries."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    # Processes log the same messages; only the first one shows them.
    logging.getLogger("lora_hf").setLevel(logging.ERROR if rank() else logging.INFO)
    # On import it warns about an inference kernel that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
