"""What git leaves in the place of a large file where git-lfs is not installed: a pointer of three lines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
ADVICE = "a pointer of git-lfs instead of the file itself; run 'git lfs pull' in its clone, or download the file again"


def explain_pointer(files: Iterable[Path]) -> str:
    """Returns what is wrong with the first file that is only a pointer, or an empty string."""
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(POINTER)) == POINTER:
                    return f"{file.name} is {ADVICE}"
    return ""
