"""Predictions and references as people keep them on disk for the official scorers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lora_hf.core.errors import DataError

_NUMBERED = re.compile(r"(?P<stem>.*reference)(?P<number>\d+)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class References:
    """The references of each input, in order; `tokenized` where spaces part their tokens, as in `.lex` files."""

    groups: list[list[str]]
    tokenized: bool


def read_predictions(path: Path, references: References) -> list[str]:
    """The predictions, one a line.

    Raises:
        DataError: the file is missing, empty, not UTF-8, has an empty line, or not one line for each group.
    """
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"{path}, line {number}: empty; expected a prediction")
    if len(lines) != len(references.groups):
        raise DataError(
            f"{path}: expected a prediction a line for each of {len(references.groups)} groups of references, found "
            f"{len(lines)} lines; groups are parted by an empty line"
        )
    return [line.strip() for line in lines]


def read_references(paths: Sequence[Path]) -> References:
    """References in one of two forms.

    One text file is the form of e2e-metrics: a reference a line, and an empty line between the groups. A folder, a
    `.lex` file, or several files are the form of WebNLG and DART: file k holds the k-th reference of each input, a line
    each, an empty line where there is none. Of a folder the files `<any>reference<k>.<any>` are read.

    Raises:
        DataError: a file is missing, empty or not UTF-8, the files have different numbers of lines, an input has no
            reference, or a folder holds no such files, or more than one set.
    """
    files = _numbered_files(paths[0]) if len(paths) == 1 and paths[0].is_dir() else list(paths)
    if len(files) == 1 and files[0].suffix != ".lex":
        return References(_groups(files[0]), tokenized=False)
    return References(_columns(files), tokenized=all(file.suffix == ".lex" for file in files))


def _groups(path: Path) -> list[list[str]]:
    lines = [line.strip() for line in _lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    for number, (before, line) in enumerate(zip(["", *lines], lines, strict=False), start=1):
        if not before and not line:
            raise DataError(f"{path}, line {number}: empty; expected a reference, as a group has at least one")
    return [list(group) for filled, group in groupby(lines, key=bool) if filled]


def _columns(files: list[Path]) -> list[list[str]]:
    columns = [_lines(file) for file in files]
    count = len(columns[0])
    for file, column in zip(files, columns, strict=True):
        if len(column) == count - 1:
            column.append("")  # a last line that is empty and has no end of its own cannot be seen
        if len(column) != count:
            raise DataError(
                f"{file}: expected {count} lines as in {files[0]}, found {len(column)}; where a reference is missing, "
                f"leave the line empty"
            )
    groups = [[line.strip() for line in row if line.strip()] for row in zip(*columns, strict=True)]
    if [] in groups:
        names = ", ".join(file.name for file in files)
        raise DataError(
            f"{files[0].parent}, line {groups.index([]) + 1}: empty in all of {names}; expected a reference"
        )
    return groups


def _numbered_files(folder: Path) -> list[Path]:
    sets: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        name = _NUMBERED.fullmatch(file.name)
        if name is not None:
            sets.setdefault(name["stem"], {})[int(name["number"])] = file
    if len(sets) != 1:
        found = ", ".join(f"{stem}*" for stem in sets) or "none"
        raise DataError(
            f"{folder}: expected one set of files such as gold-all-cat-reference0.lex, found {found}; name the files"
        )
    (files,) = sets.values()
    if sorted(files) != list(range(len(files))):
        raise DataError(
            f"{folder}: expected files numbered from 0 without a gap, found {sorted(files)}; name the files"
        )
    return [files[number] for number in sorted(files)]


def _lines(path: Path) -> list[str]:
    """The lines of a text file, parted by line feeds alone: a text may hold any other separator of Unicode."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"{path}: empty; expected a text a line")
    return text.removesuffix("\n").split("\n")
