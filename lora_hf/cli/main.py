"""The command line: `lora-hf <verb>`, or `python scripts/<verb>.py`.

Results go to standard output, progress and logs to standard error. Exit 0: done; 2: the user's mistake, told in one
message; 130 and 143: stopped by Ctrl-C or SIGTERM; 1: a bug, with its traceback. Of several processes one speaks.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lora_hf.cli.commands import (
    benchmark,
    combine,
    compare,
    convert,
    demo,
    evaluate,
    generate,
    info,
    merge,
    predict,
    push,
    score,
    serve,
    sweep,
    train,
)
from lora_hf.core.errors import Interrupted, UserError, did_you_mean
from lora_hf.training.distributed import claim_error_report, rank, require_single_process

VERBS = (
    train,
    sweep,
    evaluate,
    predict,
    generate,
    score,
    merge,
    combine,
    convert,
    compare,
    push,
    serve,
    benchmark,
    info,
    demo,
)


def main(arguments: Sequence[str] | None = None, verb: str | None = None) -> int:
    """Runs one verb; `scripts/<verb>.py` names it, otherwise it is the first argument."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parse(words if verb is None else [verb, *words], verb)

    def run() -> None:
        if parsed.verb != "train":
            require_single_process(parsed.verb)
        parsed.run(parsed)

    return exit_code_of(run, parsed.verb)


def exit_code_of(run: Callable[[], None], verb: str) -> int:
    """Runs a command with logs on standard error; its exit code, once a user's mistake has been printed."""
    _log_to_standard_error()
    try:
        run()
    except UserError as error:
        return _end(f"error: {error}", 2)
    except Interrupted as stop:
        # Sweeps and benchmarks know what they have finished and take no --resume; the demo knows nothing.
        again = f"start it again{' from the beginning' if verb == 'demo' else ''} with the same command"
        return _end(f"stopped by {stop if verb == 'train' else f'{stop.kind.name}: {again}'}", stop.code)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except Exception:
        if claim_error_report():
            raise
        return 1
    return 0


def _end(message: str, code: int) -> int:
    if claim_error_report():
        print(message, file=sys.stderr)
    return code


def _parse(words: list[str], verb: str | None) -> argparse.Namespace:
    """The options; overrides (`key=value`) may stand anywhere among them, which argparse alone does not allow."""
    parser, verbs = _parsers(verb)
    if not words:
        parser.print_help(sys.stderr)  # and no success: a program that forgot the verb must not go on
        parser.exit(2)
    if not words[0].startswith("-") and words[0] not in verbs:
        parser.error(f"no verb {words[0]!r}{did_you_mean(words[0], verbs)}; expected {', '.join(verbs)}")
    if words[0] in verbs and (file := _bare_config(words[1:], verbs[words[0]])):
        verbs[words[0]].error(f"--config is required: did you mean --config {file}?")
    parsed, rest = parser.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(parsed, "overrides")]
    if strange:
        hint = _as_override(strange[0], words) if hasattr(parsed, "overrides") else ""
        verbs[parsed.verb].error(f"unrecognized arguments: {' '.join(strange)}{hint}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _bare_config(words: list[str], parser: argparse.ArgumentParser) -> str:
    """The file that was given without the `--config` that the verb needs; an empty string where there is none."""
    if "--config" not in parser.format_usage().split() or any(word.startswith("--c") for word in words):
        return ""
    return next((word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word), "")


def _as_override(option: str, words: list[str]) -> str:
    """What to write for `--lr 1e-3`, where a key of the config is called so."""
    from lora_hf.core.config.hints import find_keys
    from lora_hf.core.config.schema import known_keys

    name, _, value = option.partition("=")
    value = value or next(iter(words[words.index(option) + 1 :]), "VALUE")
    section, dot, key = name.removeprefix("--").replace("-", "_").rpartition(".")
    meant = [full for full in find_keys(key, known_keys()) if full.startswith(section + dot)]
    return f"; did you mean {' or '.join(f'{full}={value}' for full in meant)}?" if meant else ""


class _OfScript(argparse.ArgumentParser):
    """The parser of a verb that a script names: it calls itself `python scripts/train.py`."""

    def __init__(self, *, prog: str, **options: Any) -> None:
        super().__init__(prog=re.sub(r"^python scripts (\S+)$", r"python scripts/\1.py", prog), **options)


def _parsers(verb: str | None) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole line, and that of each verb."""
    parser = argparse.ArgumentParser(prog="lora-hf" if verb is None else "python scripts", description=__doc__)
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=argparse.ArgumentParser if verb is None else _OfScript
    )
    for command in VERBS:
        command.add(verbs)
    return parser, verbs.choices


def _log_to_standard_error() -> None:
    """Our own messages on standard error; the libraries speak up only where something is wrong."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    # What all processes have to say, the first one says.
    logging.getLogger("lora_hf").setLevel(logging.ERROR if rank() else logging.INFO)
    # On import it regrets a kernel for inference that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
