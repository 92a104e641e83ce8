"""The mistakes a person can make, each told in one message: what, expected, found, and the next step.

The command line turns a `UserError` into its message on standard error and exit code 2. Anything else that
escapes is a bug in lora_hf and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; the message says how."""


class ConfigError(UserError):
    """A configuration that cannot be run: unknown key, wrong type, out of range."""


class DataError(UserError):
    """Data that are missing, malformed, or not what the task needs."""


class ModelError(UserError):
    """A base model that cannot be found, loaded, or injected."""


class AdapterError(UserError):
    """An adapter folder that is damaged or does not belong to this model."""


class HubError(UserError):
    """The hub could not be reached, or refused."""


class TrainingError(UserError):
    """A run that would not train, or stopped training: nothing to train, no gradient, a loss that is not a number."""


class Interrupted(KeyboardInterrupt):
    """A run that the signal `kind` ended, Ctrl-C or SIGTERM; `code` is what a shell expects then."""

    def __init__(self, kind: signal.Signals, message: str) -> None:
        super().__init__(f"{kind.name}: {message}")
        self.kind, self.code = kind, 128 + kind


def how_to_install(*extras: str) -> str:
    """The command that installs extras of lora_hf, in a clone of it: no package index has it."""
    return f"python -m pip install -e '.[{','.join(extras)}]'"


def did_you_mean(word: str, known: Iterable[str], count: int = 1) -> str:
    """Returns `` (did you mean 'x'?)`` for the nearest of `known`, or an empty string where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
