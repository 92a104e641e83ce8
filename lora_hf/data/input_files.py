"""Inputs to predict, from a text file or a file of JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.errors import DataError, did_you_mean
from lora_hf.data.readers import parse_object, read_lines


def read_rows(path: Path, columns: Sequence[str]) -> dict[str, list]:
    """Reads rows from a `.jsonl` file with the task's columns, or for a single column from a text file.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or a line lacks a column.
    """
    if not _is_json(path) and len(columns) > 1:
        raise DataError(f"{path}: this task reads {' and '.join(columns)}; expected a .jsonl file with these keys")
    rows = []
    for location, line in _numbered_lines(path):
        if _is_json(path):
            row = parse_object(line, location)
            rows.append([_text(row, column, location) for column in columns])
        elif line.strip():
            rows.append([line])
        else:
            raise DataError(f"{location}: empty; expected a text")
    return {column: [row[index] for row in rows] for index, column in enumerate(columns)}


def read_mixed_rows(path: Path, columns: Mapping[str, Sequence[str]]) -> list[tuple[str, dict[str, str]]]:
    """Reads rows for several adapters from a `.jsonl` file: each names its adapter under "adapter".

    Args:
        columns: the columns of each adapter's task.

    Raises:
        DataError: as `read_rows`; also an unknown adapter.
    """
    if not _is_json(path):
        raise DataError(f"{path}: several adapters need a .jsonl file whose rows name theirs under 'adapter'")
    rows = []
    for location, line in _numbered_lines(path):
        row = parse_object(line, location)
        adapter = _text(row, "adapter", location)
        if adapter not in columns:
            near = did_you_mean(adapter, columns)
            raise DataError(f"{location}: no adapter {adapter!r} was given{near}; expected one of {', '.join(columns)}")
        rows.append((adapter, {column: _text(row, column, location) for column in columns[adapter]}))
    return rows


def _is_json(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json")


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    return ((f"{path}, line {number}", line) for number, line in enumerate(read_lines(path), start=1))


def _text(row: dict[str, Any], column: str, location: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        near = did_you_mean(column, row)
        raise DataError(f"{location}: expected a text under {column!r}, found {value!r:.100}{near}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{location}: {column!r} holds half of a surrogate pair; write the whole character")
    return value
