"""Errors that the user can fix. Each has one message: what is wrong, what was expected, what was found, the next step.

The command line prints the message of a `UserError` and exits with code 2. Any other exception is a bug in lora_hf
and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """The user can fix it, and the message says how."""


class ConfigError(UserError):
    """An invalid setting: an unknown key, a wrong type, a value out of range, settings that exclude each other."""


class DataError(UserError):
    """Data that are missing, malformed, or not what the task needs."""


class ModelError(UserError):
    """A base model that cannot be found, loaded, or injected."""


class AdapterError(UserError):
    """An adapter that is damaged or belongs to another model."""


class HubError(UserError):
    """The hub is unreachable, or refused the request."""


class TrainingError(UserError):
    """A run that does not train: no trainable parameters, no gradients, a loss that is not finite."""


class DivergedError(TrainingError):
    """The loss is NaN or infinite at optimizer step `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(KeyboardInterrupt):
    """A run ended by the signal `kind` (Ctrl-C or SIGTERM); `code` is the exit code a shell expects."""

    def __init__(self, kind: signal.Signals, message: str) -> None:
        super().__init__(f"{kind.name}: {message}")
        self.kind, self.code = kind, 128 + kind


def how_to_install(*extras: str) -> str:
    """Returns the command that installs extras of lora_hf from a clone: the package is not on PyPI."""
    return f"python -m pip install -e '.[{','.join(extras)}]'"


def did_you_mean(word: str, known: Iterable[str], count: int = 1) -> str:
    """Returns `` (did you mean 'x'?)`` for the nearest of `known`, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
