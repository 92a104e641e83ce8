"""What makes the commands start sooner: imports that wait neither for PEFT nor for the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 500  # modules; torch and transformers import about 3,500, at the start of a process, when there is no model yet


def hide_peft() -> None:
    """Makes `import peft` fail in this process: transformers' Trainer imports PEFT if it can, which takes seconds.

    No command uses it. transformers' `is_peft_available` is false from here on.
    """
    sys.modules.setdefault("peft", None)  # type: ignore[arg-type]


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Imports torch and transformers without collecting garbage, which would take a fifth of the time.

    The modules and their classes are over a million objects, and nearly all of them stay. After many of them they are
    frozen, so that no later collection looks through them; the Trainer starts some itself.
    """
    modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - modules > MANY:
            gc.freeze()
        if was_enabled:
            gc.enable()
