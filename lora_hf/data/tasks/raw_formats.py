"""The files of the generation data sets as their authors published them, and the hub's layouts of the same rows.

Each reader gives the columns that the local parquet files have, so that a task reads one layout whatever the source.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lora_hf.core.errors import DataError
from lora_hf.data.tasks.sources import check_columns, decode, in_memory

if TYPE_CHECKING:
    from datasets import Dataset

Files = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class CommaSeparated:
    """CSV files in UTF-8 with a header; a quoted field may hold commas and newlines, as E2E's do.

    `columns` maps the column to the name in the file's header.
    """

    files: Files
    columns: Mapping[str, str]

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the rows in file order.

        Raises:
            DataError: not UTF-8, no such column, a row with too few or too many fields, a quote that is never closed.
        """
        import pyarrow

        header, rows = read_csv(path)
        check_columns(header, self.columns.values(), str(path))
        table = {
            column: pyarrow.array((row[header.index(name)] for row in rows), pyarrow.string())
            for column, name in self.columns.items()
        }
        return in_memory(pyarrow.table(table))


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a CSV file in UTF-8, empty lines left out.

    Raises:
        DataError: not UTF-8, a row with too few or too many fields, a quote that is never closed.
    """
    lines = csv.reader(io.StringIO(decode(path), newline=""), strict=True)
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
    return header, rows


@dataclass(frozen=True)
class DartJson:
    """DART's JSON files: a list of {tripleset, subtree_was_extended, annotations: [{source, text}]}."""

    files: Files

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the rows in file order.

        Raises:
            DataError: not UTF-8, not JSON, or not of that form.
        """
        try:
            entries = json.loads(decode(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} cannot be read as JSON: {error}. Download the file again.") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: expected a list of entries, each with 'tripleset' and 'annotations'")
        for index, entry in enumerate(entries):
            check_columns(list(entry), ("tripleset", "annotations"), f"{path}: entry {index} (counting from 0)")
        rows = [{**dict.fromkeys(_DART_COLUMNS), **entry} for entry in entries]
        return _typed_rows(rows, _DART_COLUMNS, str(path))


@dataclass(frozen=True)
class WebNlgXml:
    """The XML of the WebNLG challenge 2017: one file, or a folder with files at any depth, read in order of name."""

    files: Files

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the entries of the file, or of all files of the folder.

        Raises:
            DataError: no file, not XML, or an entry that is not of the challenge's form.
        """
        files = sorted(path.rglob("*.xml")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path}: no .xml file in this folder; expected the challenge's, such as 1triples/*.xml")
        return _typed_rows([row for file in files for row in _entries(file)], _WEB_NLG_COLUMNS, str(path))


def dart_rows(rows: Dataset) -> Dataset:
    """Returns the hub's rows in the local layout: `annotations` as one struct for each text."""
    columns = rows.column_names
    if len(rows) == 0 or not {"tripleset", "annotations"} <= set(columns):
        return rows
    if not isinstance(rows[0]["annotations"], Mapping):
        return rows
    adapted = [
        {
            "tripleset": row["tripleset"],
            "subtree_was_extended": row.get("subtree_was_extended"),
            "annotations": [
                {"source": source, "text": text}
                for source, text in zip(row["annotations"]["source"], row["annotations"]["text"], strict=True)
            ],
        }
        for row in _dicts(rows)
    ]
    return _typed_rows(adapted, _DART_COLUMNS, "the hub's rows")


def web_nlg_rows(rows: Dataset) -> Dataset:
    """Returns the hub's rows in the local layout.

    The hub's test split holds the 1,862 entries three times over, in part: without texts, with them, and the unseen
    ones again. Only those with texts are kept.
    """
    if not {"modified_triple_sets", "lex", "category"} <= set(rows.column_names):
        return rows
    adapted = [
        {
            "category": row["category"],
            "size": row.get("size"),
            "eid": row.get("eid"),
            "modified_triple_set": (_field(row["modified_triple_sets"], "mtriple_set") or [None])[0],
            "lex_lid": _field(row["lex"], "lid"),
            "lex_comment": _field(row["lex"], "comment"),
            "lex_text": _field(row["lex"], "text"),
        }
        for row in _dicts(rows)
        if (row.get("test_category") or _WITH_TEXTS) == _WITH_TEXTS
    ]
    return _typed_rows(adapted, _WEB_NLG_COLUMNS, "the hub's rows")


_WITH_TEXTS = "testdata_with_lex"

# Columns and their types, in the notation of `datasets.Features`; a list of one type is a list of any length.
_DART_COLUMNS: dict[str, Any] = {
    "tripleset": [["string"]],
    "subtree_was_extended": "bool",
    "annotations": [{"source": "string", "text": "string"}],
}
_WEB_NLG_COLUMNS: dict[str, Any] = {
    "category": "string",
    "size": "int32",
    "eid": "string",
    "modified_triple_set": ["string"],
    "lex_lid": ["string"],
    "lex_comment": ["string"],
    "lex_text": ["string"],
}


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{file} cannot be read as XML: {error}. Download the file again.") from error
    found = False
    for entry in root.iter("entry"):
        found = True
        triples = entry.find("modifiedtripleset")
        eid, category = entry.get("eid"), entry.get("category")
        if triples is None or category is None:
            missing = "attribute 'category'" if category is None else "element <modifiedtripleset>"
            raise DataError(f"{file}: the entry with eid={eid!r} has no {missing}")
        size = entry.get("size", "")
        texts = entry.findall("lex")
        yield {
            "category": category,
            "size": int(size) if size.isdecimal() else None,
            "eid": eid,
            "modified_triple_set": [(triple.text or "").strip() for triple in triples.findall("mtriple")],
            "lex_lid": [text.get("lid") for text in texts],
            "lex_comment": [text.get("comment") for text in texts],
            "lex_text": [(text.text or "").strip() for text in texts],
        }
    if not found:
        raise DataError(f"{file}: no <entry>; expected the form of the WebNLG challenge 2017")


def _typed_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any], where: str) -> Dataset:
    import pyarrow

    schema = pyarrow.schema([(name, _arrow_type(kind)) for name, kind in columns.items()])
    try:
        return in_memory(pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema))
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{where}: the entries do not have the types of the data set: {error}") from error


def _arrow_type(kind: Any) -> Any:
    import pyarrow

    if isinstance(kind, list):
        return pyarrow.list_(_arrow_type(kind[0]))
    if isinstance(kind, dict):
        return pyarrow.struct([(name, _arrow_type(inner)) for name, inner in kind.items()])
    return pyarrow.type_for_alias(kind)


def _dicts(rows: Dataset) -> Iterator[dict[str, Any]]:
    return (dict(row) for row in rows)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _field(value: Any, name: str) -> list[Any]:
    """A field of a list of structs, which datasets also stores as one struct of lists."""
    return list(value[name]) if isinstance(value, Mapping) else [item[name] for item in value]
