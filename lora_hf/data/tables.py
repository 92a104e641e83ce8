"""Tables with all columns of a user's file, to which `predict` adds its own. The rows keep their order.

`data.readers` checks what a model reads; here the other columns come along as they are.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.atomic_io import atomic_path
from lora_hf.core.errors import ConfigError
from lora_hf.data.readers import TABLE_SUFFIXES, read_lines, read_objects

if TYPE_CHECKING:
    import pyarrow

Rows = list[dict[str, Any]]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LIST_SEPARATOR = "|"  # between labels in a field of a CSV file


def check_output(path: Path, source: Path | None = None) -> None:
    """Raises ConfigError for a file that `write_table` cannot write, or that is the input itself."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(
            f"--output {path}: expected a file that ends in {', '.join(TABLE_SUFFIXES)}, found "
            f"{path.suffix or 'no suffix'}"
        )
    if source is not None and path.resolve() == source.resolve():
        raise ConfigError(f"--output {path}: this is the --input file, which it would replace; name another")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: no such folder {path.parent}; create it first")


def read_table(path: Path, text_column: str) -> Rows | pyarrow.Table:
    """Returns all columns of a file: a parquet table with its types, else the rows as the file holds them.

    Args:
        text_column: the name of the only column of a text file.

    Raises:
        DataError: not a file of its format.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path)
    if suffix in TABLE_SUFFIXES:
        return read_objects(path)
    return [{text_column: line} for line in read_lines(path)]


def add_columns(
    rows: Rows | pyarrow.Table, added: Sequence[dict[str, Any]]
) -> tuple[Rows | pyarrow.Table, dict[str, str]]:
    """Returns the table with a column for each key of `added`, which has as many rows.

    Returns:
        The table, and the new columns whose name the file has already, with the name that they get instead.
    """
    import pyarrow

    taken = list(dict.fromkeys(name for row in rows for name in row)) if isinstance(rows, list) else rows.column_names
    names: dict[str, str] = {}
    for name in dict.fromkeys(name for answer in added for name in answer):
        names[name] = _free_name(name, [*taken, *names.values()])
    renamed = {name: other for name, other in names.items() if name != other}
    if isinstance(rows, list):
        return [
            {**row, **{names[key]: value for key, value in answer.items()}}
            for row, answer in zip(rows, added, strict=True)
        ], renamed
    table: Any = rows
    for key, name in names.items():
        table = table.append_column(name, pyarrow.array([answer.get(key) for answer in added]))
    return table, renamed


def _free_name(name: str, taken: Sequence[str]) -> str:
    found = name
    while found in taken:
        found = f"{name}_predicted" if found == name else f"{found}_2"
    return found


def write_table(path: Path, rows: Rows | pyarrow.Table) -> None:
    """Writes the table in the format that the suffix names, completely or not at all.

    Raises:
        ConfigError: the file cannot be written, or its format cannot hold a value.
    """
    write = {".parquet": _write_parquet, ".json": _write_json, ".jsonl": _write_json}
    try:
        with atomic_path(path) as partial:
            write.get(path.suffix.lower(), _write_csv)(partial, rows, path.suffix.lower())
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"--output {path}: {error}; write another format") from error


def _write_parquet(path: Path, rows: Any, suffix: str) -> None:
    import pyarrow
    from pyarrow import parquet

    if isinstance(rows, list):
        names = dict.fromkeys(name for row in rows for name in row)
        rows = pyarrow.table({name: _arrow_column(name, [row.get(name) for row in rows]) for name in names})
    parquet.write_table(rows, path)


def _arrow_column(name: str, values: list[Any]) -> pyarrow.Array:
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        raise ValueError(f"column {name!r} has values of several types, which parquet cannot hold") from error


def _write_json(path: Path, rows: Any, suffix: str) -> None:
    lines = [json.dumps(_json_value(row), ensure_ascii=False) for row in _as_rows(rows)]
    text = "".join(f"{line}\n" for line in lines) if suffix == ".jsonl" else "[" + ",\n".join(lines) + "]\n"
    path.write_text(text, encoding="utf-8")


def _write_csv(path: Path, rows: Any, suffix: str) -> None:
    rows = _as_rows(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.writer(text, delimiter=DELIMITERS[suffix], lineterminator="\n")
    table.writerow(names)
    table.writerows([_field(row.get(name)) for name in names] for row in rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def _as_rows(rows: Any) -> Rows:
    return rows if isinstance(rows, list) else rows.to_pylist()


def _field(value: Any) -> str:
    """A value as a CSV field: a list of words joined, other lists and objects as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(item, str) and LIST_SEPARATOR not in item for item in value):
        return LIST_SEPARATOR.join(value)
    value = _json_value(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json_value(value: Any) -> Any:
    """A value of a parquet file as JSON can hold it: dates and decimals as text, NaN as null."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{type(value).__name__} {value!r:.60} is neither text nor number")
