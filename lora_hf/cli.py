"""The command line: `lora-hf <verb>`, or `python scripts/<verb>.py`.

Results go to standard output, progress and logs to standard error. Exit 0: done; 2: the user's mistake, told in one
message; 1: a bug, with its traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from lora_hf.commands import (
    benchmark,
    combine,
    convert,
    demo,
    evaluate,
    generate,
    merge,
    predict,
    push,
    score,
    train,
)
from lora_hf.errors import UserError

VERBS = (train, evaluate, predict, generate, score, merge, combine, convert, push, benchmark, demo)


def main(arguments: Sequence[str] | None = None, verb: str | None = None) -> int:
    """Runs one verb; `scripts/<verb>.py` names it, otherwise it is the first argument."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser(verb).parse_args(words if verb is None else [verb, *words])
    _speak_on_standard_error()
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-hf" if verb is None else "python scripts", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for command in VERBS:
        command.add(verbs)
    return parser


def _speak_on_standard_error() -> None:
    """Our own messages on standard error; the libraries speak up only where something is wrong."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    logging.getLogger("lora_hf").setLevel(logging.INFO)
    # On import it regrets a kernel for inference that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when torch is loaded. Threads that spin for long while they wait take the core from the one that is late:
    # beside a busy program a step takes twice as long. Threads that sleep at once are woken too late for the next
    # kernel: alone on the machine it takes a third longer. A short spin has little of either.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
