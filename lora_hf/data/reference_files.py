"""Files of predictions and references in the forms of the official scorers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lora_hf.core.errors import DataError
from lora_hf.data.readers import TABLE_SUFFIXES, read_lines, read_texts

_NUMBERED_FILE = re.compile(r"(?P<stem>.*reference)(?P<number>\d+)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class References:
    """The references of each input, in order; `tokenized` if spaces separate their tokens, as in `.lex` files."""

    groups: list[list[str]]
    tokenized: bool


def read_predictions(path: Path, references: References) -> list[str]:
    """Reads a prediction from each line, or from each row of a table such as `.jsonl` the column `text`.

    Raises:
        DataError: the file is missing, empty, not UTF-8, has an empty line, or not one line per group of references.
    """
    if path.suffix.lower() in TABLE_SUFFIXES:
        lines = [" ".join(text.split()) for text in read_texts(path, ("text",), {"text": ("output",)})["text"]]
    else:
        lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"{path}, line {number}: empty; expected a prediction")
    if len(lines) != len(references.groups):
        raise DataError(
            f"{path}: expected a prediction for each of {len(references.groups)} groups of references, found "
            f"{len(lines)} lines; empty lines separate the groups"
        )
    return [line.strip() for line in lines]


def read_references(paths: Sequence[Path]) -> References:
    """Reads references in one of two forms.

    One text file has the form of e2e-metrics: a reference per line, and an empty line between the groups. A folder, a
    `.lex` file, or several files have the form of WebNLG and DART: file k holds the k-th reference of each input, one
    per line, with an empty line if there is none. A folder's files are those named `<any>reference<k>.<any>`.

    Raises:
        DataError: a file is missing, empty or not UTF-8, the files have different numbers of lines, an input has no
            reference, or a folder does not hold exactly one set of files.
    """
    files = _numbered_files(paths[0]) if len(paths) == 1 and paths[0].is_dir() else list(paths)
    for file in files:
        if file.suffix.lower() in TABLE_SUFFIXES:
            raise DataError(f"{file}: expected references as lines of text, found a {file.suffix} file")
    if len(files) == 1 and files[0].suffix != ".lex":
        return References(_read_groups(files[0]), tokenized=False)
    return References(_read_columns(files), tokenized=all(file.suffix == ".lex" for file in files))


def _read_groups(path: Path) -> list[list[str]]:
    lines = [line.strip() for line in read_lines(path)]
    while not lines[-1]:
        lines.pop()
    for number, (previous, line) in enumerate(zip(["", *lines], lines, strict=False), start=1):
        if not previous and not line:
            raise DataError(f"{path}, line {number}: empty; expected a reference, as a group has at least one")
    return [list(group) for filled, group in groupby(lines, key=bool) if filled]


def _read_columns(files: list[Path]) -> list[list[str]]:
    columns = [read_lines(file) for file in files]
    count = len(columns[0])
    for file, column in zip(files, columns, strict=True):
        if len(column) == count - 1:
            column.append("")  # an empty last line without its own line break
        if len(column) != count:
            raise DataError(
                f"{file}: expected {count} lines as in {files[0]}, found {len(column)}; leave the line of a missing "
                "reference empty"
            )
    groups = [[line.strip() for line in row if line.strip()] for row in zip(*columns, strict=True)]
    if [] in groups:
        names = ", ".join(file.name for file in files)
        line = groups.index([]) + 1
        raise DataError(f"{files[0].parent}, line {line}: empty in all of {names}; expected a reference")
    return groups


def _numbered_files(folder: Path) -> list[Path]:
    sets: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        if name := _NUMBERED_FILE.fullmatch(file.name):
            sets.setdefault(name["stem"], {})[int(name["number"])] = file
    if len(sets) != 1:
        found = ", ".join(f"{stem}*" for stem in sets) or "none"
        raise DataError(
            f"{folder}: expected one set of files such as gold-all-cat-reference0.lex, found {found}; name the files"
        )
    (files,) = sets.values()
    if sorted(files) != list(range(len(files))):
        raise DataError(f"{folder}: expected files numbered from 0 without gaps, found {sorted(files)}; name the files")
    return [files[number] for number in sorted(files)]
