"""The reader of every file that a user brings: CSV, TSV, JSON lines, JSON, parquet and plain text.

The suffix tells the format. Every error names the file, and the row or line where it can.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError, did_you_mean
from lora_hf.core.git_lfs import ADVICE, POINTER, explain_pointer
from lora_hf.core.parsing import parse_json
from lora_hf.data.arrays import to_array
from lora_hf.data.tasks.row_checks import ONE_OBJECT, check_any, check_columns, check_filled, check_text, nfc

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

# csv itself stops at 131,072 characters; how long a text may be is for `check_text` to say.
csv.field_size_limit(2**31 - 1)

_ENCODINGS = {  # by byte-order mark; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHER_FORMATS = {
    b"PAR1": "this is a parquet file; name it .parquet",
    b"PK\x03\x04": "this is a zip archive or an Excel workbook; save the table as CSV",
    b"\xd0\xcf\x11\xe0": "this is an Excel workbook; save the table as CSV",
    b"\x1f\x8b": "this is a gzip file; unpack it first",
    b"\x28\xb5\x2f\xfd": "this is a zstd file; unpack it first",
    b"BZh": "this is a bzip2 file; unpack it first",
    b"\xfd7zXZ": "this is an xz file; unpack it first",
    b"ARROW1": "this is an Arrow file; save the table as parquet",
    POINTER: f"this is {ADVICE}",
}


def read_rows(
    path: Path,
    columns: Iterable[str],
    optional: Iterable[str] = (),
    other_names: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """Returns columns of a file. The values of CSV, TSV and text files are text.

    Args:
        optional: further columns, which the file may lack.
        other_names: what else a column may be called in the file.

    Raises:
        DataError: an unknown suffix, a missing or repeated column, or a file that is not of its format.
    """
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; expected a file that ends in {_or(_READERS)}")
    wanted = _Wanted(path, tuple(columns), tuple(optional), other_names or {})
    return _READERS[path.suffix.lower()](path, wanted)


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Returns all columns of a table as they are, also lists and objects inside, without the nulls in these.

    Raises:
        DataError: as `read_rows`.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; expected a file that ends in {_or(TABLE_SUFFIXES)}")
    if _READERS[suffix] is _read_json:
        return _json_objects(path)
    return _without_nulls(_READERS[suffix](path, _Wanted(path, all_columns=True)).to_list())


def _without_nulls(value: Any) -> Any:
    """Parquet gives each object of a column the keys of all of them."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value


def read_texts(
    path: Path, columns: Sequence[str], other_names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """Returns the texts of a file to answer, by column. No row is left out.

    Raises:
        DataError: as `read_rows`; also a value that is no text, or an empty one.
    """
    rows = read_rows(path, columns, other_names=other_names)
    check_text(rows, str(path), tuple(columns))
    texts = {column: rows[column][:] for column in columns}
    for column in columns:
        for row, text in enumerate(texts[column]):
            check_filled(text, path, row, column)
    return texts


def read_texts_of_adapters(path: Path, columns: Mapping[str, Sequence[str]]) -> list[tuple[str, dict[str, str]]]:
    """Returns the adapter and the texts of each row of a file whose rows name their adapter under "adapter".

    Args:
        columns: the columns of each adapter's task.

    Raises:
        DataError: as `read_texts`; also an unknown adapter.
    """
    names = dict.fromkeys(column for of_adapter in columns.values() for column in of_adapter)
    rows = read_rows(path, ("adapter",), optional=names)
    check_text(rows, str(path), ("adapter",))
    texts = []
    for number, row in enumerate(rows.to_list()):
        adapter = row["adapter"]
        if adapter not in columns:
            raise DataError(
                f"{path}: row {number} (counting from 0): no adapter {adapter!r} was given"
                f"{did_you_mean(adapter, columns)}; expected one of {', '.join(columns)}"
            )
        for column in columns[adapter]:
            check_filled(row.get(column), path, number, column)
        texts.append((adapter, {column: row[column] for column in columns[adapter]}))
    return texts


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, or one in UTF-16 or UTF-32 with a byte-order mark, without the mark.

    Raises:
        DataError: it cannot be read, or is neither.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for magic, what in _OTHER_FORMATS.items():
        if content.startswith(magic):
            raise DataError(f"{path}: {what}")
    encoding = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"{content[error.start]:#04x}"
        name = encoding.upper()
        raise DataError(f"{path}, line {line}: not {name}: found the byte {byte}; save the file as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: a NUL character, as in UTF-16 without a mark; save the file as UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 file. Only line feeds end a line: a text may hold Unicode's other separators.

    A file without line feeds, from an old Mac or some exports, ends its lines with carriage returns.

    Raises:
        DataError: as `read_text`; also an empty file.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: empty; expected a text on each line")
    end = "\r\n" if "\n" in text else "\r"
    return text.replace(end, "\n").removesuffix("\n").split("\n")


def read_parquet(path: Path, wanted: _Wanted | None = None) -> Dataset:
    """Returns the rows of a parquet file.

    Raises:
        DataError: not a parquet file, or a damaged one.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        if wanted is None:
            return to_dataset(table)
        found = wanted.find(table.column_names)
        table = table.select(list(found.values()))
        for index, column in enumerate(table.schema):
            if pyarrow.types.is_dictionary(column.type):  # a category of pandas
                table = table.set_column(index, column.name, table.column(index).cast(column.type.value_type))
            elif pyarrow.types.is_string_view(column.type):  # a text of polars
                table = table.set_column(index, column.name, table.column(index).cast(pyarrow.string()))
        return to_dataset(table).rename_columns(dict(zip(table.column_names, found, strict=True)))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = explain_pointer([path]) or error
        raise DataError(f"{path} cannot be read as parquet: {reason}. Download or write the file again.") from error


def to_dataset(table: pyarrow.Table) -> Dataset:
    """Returns the rows of a table, in memory."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table))


@dataclass(frozen=True)
class _Wanted:
    """The columns that a caller of `read_rows` asks for."""

    path: Path
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    other_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    all_columns: bool = False

    def find(self, names: Sequence[str], hint: str = "") -> dict[str, int]:
        """Returns the position of each wanted column among the names in the file, whatever their Unicode normal form.

        Raises:
            DataError: a column is missing, which ends with `hint`, or there more than once.
        """
        in_file, found = [nfc(name) for name in names], {}
        for column in names if self.all_columns else (*self.columns, *self.optional):
            called = [name for name in map(nfc, (column, *self.other_names.get(column, ()))) if name in in_file]
            if called:
                if in_file.count(called[0]) > 1:
                    raise DataError(f"{self.path}: the header names {called[0]!r} more than once; rename one")
                found[column] = in_file.index(called[0])
            elif column in self.columns:
                check_columns(names, (column,), str(self.path), hint)
        return found


def _read_csv(path: Path, wanted: _Wanted, delimiter: str = ",") -> Dataset:
    """Reads a table with a header.

    Lines without anything are no rows, and columns at the end without a name, as Excel writes them, must be empty.
    """
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    start = empty_line = 0
    try:
        header = next(filter(None, lines), [])
        if not header:
            raise DataError(f"{path}: empty; expected the names of the columns in the first line")
        width = max((index for index, name in enumerate(header, start=1) if name), default=0)
        found = wanted.find(header[:width], _explain_header(header, delimiter))
        start = lines.line_num + 1
        for fields in lines:
            if not fields:
                empty_line = empty_line or lines.line_num
            elif len(fields) < width or any(fields[width:]):
                raise DataError(
                    f"{path}: the row that ends in line {lines.line_num} has {len(fields)} fields; expected "
                    f"{width} ({', '.join(header[:width])}). Put fields that hold {_SEPARATORS[delimiter]} into double "
                    "quotes."
                )
            elif empty_line and width == 1:
                raise DataError(f'{path}, line {empty_line}: empty; expected a row, such as "" for an empty text')
            else:
                rows.append(fields)
            start = lines.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path} cannot be read as CSV: line {start}: {error}. Put a field that holds a "
            "double quote into double quotes, and write the quote twice."
        ) from error
    return _to_dataset({name: [row[index] for row in rows] for name, index in found.items()}, path)


_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


def _explain_header(header: list[str], delimiter: str) -> str:
    if header[0].lower().startswith("sep="):
        return ". The first line tells Excel the separator; delete it"
    if len(header) == 1:
        for other, name in _SEPARATORS.items():
            if other in header[0] and other != delimiter:
                how = {"\t": "name it .tsv", ",": "name it .csv"}.get(other, "save it with commas")
                return f". {name.capitalize()} seem to separate the fields; {how}"
    return ". The first line names the columns"


def _read_json(path: Path, wanted: _Wanted) -> Dataset:
    """Reads the objects of a file; a key that a row lacks is null there."""
    rows = _json_objects(path)
    check_any(rows, path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    nested = len(rows) == 1 and any(isinstance(value, (list, dict)) for value in rows[0].values())
    found = wanted.find(names, ONE_OBJECT if nested else "")
    return _to_dataset({column: [row.get(names[index]) for row in rows] for column, index in found.items()}, path)


def _json_objects(path: Path) -> list[dict[str, Any]]:
    """Reads an object on each line, or one array of objects."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = _parse_json(text, str(path), "an array of objects")
        return [_checked_object(entry, f"{path}: entry {row} (counting from 0)") for row, entry in enumerate(entries)]
    lines = read_lines(path)
    while not lines[-1].strip():
        lines.pop()
    located = [(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    return [_checked_object(_parse_line(line, where, text), where) for line, where in located]


def _parse_line(line: str, where: str, text: str) -> Any:
    """Parses a line of `text`."""
    if not line.strip():
        raise DataError(f"{where}: empty; expected a JSON object")
    try:
        return _parse_json(line, where, "a JSON object on one line")
    except DataError as error:
        if _is_json(text):
            raise DataError(f"{error}{ONE_OBJECT}") from error
        raise


def _is_json(text: str) -> bool:
    try:
        parse_json(text, limit=None)
    except ValueError:
        return False
    return True


def _parse_json(text: str, where: str, what: str) -> Any:
    try:
        return parse_json(text, limit=None)
    except ValueError as error:
        raise DataError(f"{where}: not {what}: {error}") from error


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object such as {{"text": ...}}, found {value!r:.50}')
    return value


def _read_txt(path: Path, wanted: _Wanted) -> Dataset:
    """Reads a text from each line."""
    if len(wanted.columns) != 1 or wanted.optional:
        names = " and ".join(dict.fromkeys((*wanted.columns, *wanted.optional)))
        raise DataError(f"{path}: expected a file with the columns {names}, which ends in {_or(TABLE_SUFFIXES)}")
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"{path}, line {number}: empty; expected a text")
    names = {nfc(name) for name in (*wanted.columns, *wanted.other_names.get(wanted.columns[0], ()))}
    cells = [cell.strip(' "') for cell in re.split(r"[,;\t]", nfc(lines[0]))]
    if len(cells) > 1 and names & set(cells):
        raise DataError(f"{path}, line 1: a header, {lines[0]!r:.100}; name a table .csv (commas) or .tsv (tabs)")
    if any(re.match(rf'\{{.*"{re.escape(name)}"\s*:', nfc(lines[0])) for name in names):
        raise DataError(f"{path}, line 1: a JSON object, {lines[0]!r:.100}; name a file of JSON lines .jsonl")
    return _to_dataset({wanted.columns[0]: lines}, path)


def _to_dataset(columns: Mapping[str, list[Any]], path: Path) -> Dataset:
    import pyarrow

    return to_dataset(pyarrow.table({name: to_array(values, name, path) for name, values in columns.items()}))


def _or(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


_READERS: dict[str, Callable[[Path, _Wanted], Any]] = {
    ".parquet": read_parquet,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_json,
    ".json": _read_json,
    ".txt": _read_txt,
}
TABLE_SUFFIXES = tuple(suffix for suffix in _READERS if suffix != ".txt")
