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
import time
from collections.abc import Sequence
from pathlib import Path
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
from lora_hf.training.distributed import place, refuse, speaks

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
    _speak_on_standard_error()
    if machine_is_busy():
        # Read when torch is loaded. Threads that spin for long while they wait for each other, as is their default,
        # take the core from the one that is late: beside a busy program a step takes nearly twice as long. Alone on
        # the machine a short spin costs a third, because threads that sleep are woken too late for the next kernel.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        if parsed.verb != "train":
            refuse(parsed.verb)
        parsed.run(parsed)
    except UserError as error:
        return _end(f"error: {error}", 2)
    except Interrupted as stop:
        # Sweeps and benchmarks know what they have finished, and take no --resume; the demo knows of nothing.
        again = f"start it again{' from the beginning' if parsed.verb == 'demo' else ''} with the same command"
        said = stop if parsed.verb == "train" else f"{stop.kind.name}: {again}"
        return _end(f"stopped by {said}", stop.code)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except Exception:
        if speaks():
            raise
        return 1
    return 0


def _end(message: str, code: int) -> int:
    if speaks():
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
    from lora_hf.core.config.schema import keys_called

    name, _, value = option.partition("=")
    value = value or next(iter(words[words.index(option) + 1 :]), "VALUE")
    section, dot, key = name.removeprefix("--").replace("-", "_").rpartition(".")
    meant = [full for full in keys_called(key) if full.startswith(section + dot)]
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


def machine_is_busy(samples: int = 3) -> bool:
    """Whether other programs keep more than a quarter of the cores at work; False where the system does not tell."""
    running = []
    for _ in range(samples):
        try:
            words = Path("/proc/loadavg").read_text(encoding="ascii").split()
            running.append(int(words[3].partition("/")[0]) - 1)  # without this very program
        except (OSError, ValueError, IndexError):
            return False
        time.sleep(0.005)
    return sorted(running)[samples // 2] > (os.cpu_count() or 1) / 4


def _speak_on_standard_error() -> None:
    """Our own messages on standard error; the libraries speak up only where something is wrong."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    # What all processes have to say, the first one says.
    logging.getLogger("lora_hf").setLevel(logging.ERROR if place() else logging.INFO)
    # On import it regrets a kernel for inference that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
