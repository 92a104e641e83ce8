"""What makes the commands start sooner: imports that wait neither for PEFT nor for the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def hide_peft() -> None:
    """Makes `import peft` fail in this process: transformers' Trainer imports PEFT if it can, which takes seconds.

    No command uses it. `is_peft_available` of transformers is false from here on.
    """
    sys.modules.setdefault("peft", None)  # type: ignore[arg-type]


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Imports torch and transformers without collecting garbage, which would take a fifth of the time.

    The modules and their classes are over a million objects, and nearly all of them stay. The first time they are
    frozen afterwards, so that no later collection looks through them; the Trainer starts some itself. Later there may
    be a model among the objects, which must not stay.
    """
    is_first, was_enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_first and "torch" in sys.modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
