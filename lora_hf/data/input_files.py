"""Rows to predict, read from a file that a person wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.errors import DataError, did_you_mean


def read_rows(path: Path, columns: Sequence[str]) -> dict[str, list]:
    """Rows from a `.jsonl` file with the task's columns, or, for one column, from a text file with a row a line.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or a line lacks a column.
    """
    if not _as_json(path) and len(columns) > 1:
        raise DataError(f"{path}: this task reads {' and '.join(columns)}; expected a .jsonl file with these keys")
    rows = []
    for where, line in _lines(path):
        if _as_json(path):
            row = _object(where, line)
            rows.append([_text(where, row, column) for column in columns])
        elif line.strip():
            rows.append([line])
        else:
            raise DataError(f"{where}: empty; expected a text")
    return {column: [row[place] for row in rows] for place, column in enumerate(columns)}


def read_mixed_rows(path: Path, columns: Mapping[str, Sequence[str]]) -> list[tuple[str, dict[str, str]]]:
    """Rows from a `.jsonl` file that name their adapter under "adapter", with the columns of its task.

    Raises:
        DataError: as `read_rows`; also an adapter that `columns` does not name.
    """
    if not _as_json(path):
        raise DataError(f"{path}: with several adapters expected a .jsonl file whose rows name theirs under 'adapter'")
    rows = []
    for where, line in _lines(path):
        row = _object(where, line)
        name = _text(where, row, "adapter")
        if name not in columns:
            near = did_you_mean(name, columns)
            raise DataError(f"{where}: no adapter {name!r} was given{near}; there is {', '.join(columns)}")
        rows.append((name, {column: _text(where, row, column) for column in columns[name]}))
    return rows


def _as_json(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of the file, and where it stands."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not lines:
        raise DataError(f"{path}: empty; expected a row a line")
    return ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1))


def _object(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from error


def _text(where: str, row: Any, column: str) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        near = did_you_mean(column, row) if isinstance(row, dict) else ""
        raise DataError(f"{where}: expected a text under {column!r}, found {value!r:.100}{near}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{where}: {column!r} holds half of a surrogate pair; write the whole character, or leave it out"
        )
    return value
