"""Readers of UTF-8 text, CSV, JSON lines and parquet. Every error names the file, and the line where it can."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError
from lora_hf.core.parsing import parse_json

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, without a byte-order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"{content[error.start]:#04x}"
        raise DataError(f"{path}, line {line}: not UTF-8: found the byte {byte}; save the file as UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 file. Only line feeds end a line: a text may hold Unicode's other separators.

    Raises:
        DataError: as `read_text`; also an empty file.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: empty; expected a text on each line")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def parse_object(line: str, location: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        DataError: it is none; the message begins with `location`.
    """
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{location}: not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f'{location}: expected an object such as {{"text": ...}}, found {line:.50}')
    return value


def read_json_lines(path: Path) -> Dataset:
    """Returns the rows of a file with a JSON object on each line; a key that a row lacks is null there.

    Raises:
        DataError: as `read_lines` and `parse_object`; also a key with values of several types.
    """
    import pyarrow

    lines = enumerate(read_lines(path), start=1)
    rows = [parse_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]

    def column(name: str) -> pyarrow.Array:
        try:
            return pyarrow.array([row.get(name) for row in rows])
        except (pyarrow.ArrowException, OverflowError, ValueError) as error:
            raise DataError(f"{path}: {name!r} has values of several types: {error}") from error

    names = dict.fromkeys(name for row in rows for name in row)
    return to_dataset(pyarrow.table({name: column(name) for name in names}))


def read_csv(path: Path) -> Dataset:
    """Returns the rows of a CSV file with a header; all values are text, and empty lines are left out.

    Raises:
        DataError: not UTF-8, a repeated column, a row with too few or too many fields, a quote that is never closed.
    """
    import pyarrow

    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[list[str]] = []
    try:
        header = next(lines, [])
        for fields in filter(None, lines):
            if len(fields) != len(header):
                raise DataError(
                    f"{path}: the row that ends in line {lines.line_num} has {len(fields)} fields; expected "
                    f"{len(header)} ({', '.join(header)}). Put fields that hold commas into double quotes."
                )
            rows.append(fields)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: line {lines.line_num}: {error}.") from error
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{path}: the header names {', '.join(map(repr, repeated))} more than once; rename one")
    columns = {name: [row[index] for row in rows] for index, name in enumerate(header)}
    return to_dataset(pyarrow.table({name: pyarrow.array(cells, pyarrow.string()) for name, cells in columns.items()}))


def read_parquet(path: Path) -> Dataset:
    """Returns the rows of a parquet file.

    Raises:
        DataError: not a parquet file, or a damaged one.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        return to_dataset(parquet.read_table(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}. Download or write the file again.") from error


def to_dataset(table: pyarrow.Table) -> Dataset:
    """Returns the rows of a table, in memory."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table))
