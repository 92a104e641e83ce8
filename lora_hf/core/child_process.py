"""Child processes that import this package."""

from __future__ import annotations

import os
from pathlib import Path


def package_environment() -> dict[str, str]:
    """Returns an environment in which a child process imports this copy of the package, installed or not."""
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
