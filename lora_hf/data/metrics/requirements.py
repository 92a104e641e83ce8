"""Checks for what some scorers need: the packages of the extra `nlg`, and Java."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from lora_hf.core.errors import UserError, how_to_install


class ScorerError(UserError):
    """A scorer cannot run, or failed. Its score is then None, with this message as the reason."""


def package_folder(package: str) -> Path:
    """Returns the folder of an installed package of the extra `nlg`.

    Raises:
        ScorerError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise ScorerError(f"needs {package}, which is not installed: {how_to_install('nlg')}")
    return Path(folders[0]).resolve()


def java() -> str:
    """Returns the path of the `java` program.

    Raises:
        ScorerError: it is not on PATH.
    """
    program = shutil.which("java")
    if program is None:
        raise ScorerError(
            "needs Java 8 or newer, and there is no java on PATH: install it (Debian: apt install "
            "default-jre-headless; macOS: brew install openjdk)"
        )
    return program
