"""Starts a module as `python -m` does, but sooner: `python -m tests.support.quick_start MODULE ARGUMENT...`.

Like a command of the package, it imports torch without collecting garbage, and no PEFT.
"""

from __future__ import annotations

import runpy
import sys

from tests.support import preloaded  # noqa: F401

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
