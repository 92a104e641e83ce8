"""The files of the data sets as their authors published them, and the hub's layouts of the same rows.

Every reader returns the columns of the local parquet files, so that a task has one layout whatever the source.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lora_hf.core.errors import DataError
from lora_hf.core.labels import HIDDEN_LABEL
from lora_hf.core.parsing import parse_json
from lora_hf.data.readers import read_rows, read_text, to_dataset
from lora_hf.data.tasks.row_checks import check_columns, read_labels

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

Files = Mapping[str, tuple[str, ...]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TabSeparated:
    """GLUE's TSV files in UTF-8, in which quotes have no meaning.

    Args:
        columns: the hub's columns, and their names in the files' header.
        label_names: the classes; a file has a class or its id. Empty for scores.
        header: the columns of files without a header (CoLA's, except for test).
    """

    files: Files
    columns: Mapping[str, str]
    label_names: tuple[str, ...]
    header: tuple[str, ...] = ()

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the rows in file order with the hub's types, and the row's number as `idx`.

        Skips rows with too few fields with a warning, as the hub's own conversion did: QQP's file has some.

        Raises:
            DataError: not UTF-8, a missing column, a label that is neither a class nor a number.
        """
        import pyarrow
        from datasets import ClassLabel, Features, Value

        lines = csv.reader(io.StringIO(read_text(path), newline=None), delimiter="\t", quoting=csv.QUOTE_NONE)
        is_test = split.startswith("test")
        header = self.header if self.header and not is_test else tuple(next(lines, ()))
        columns = dict(self.columns)
        if is_test and columns["label"] not in header:
            del columns["label"]
        check_columns(header, columns.values(), str(path))
        positions = {column: header.index(name) for column, name in columns.items()}

        rows = [fields for fields in lines if fields]
        complete = [(number, fields) for number, fields in enumerate(rows) if len(fields) > max(positions.values())]
        if skipped := len(rows) - len(complete):
            _log.warning("%s: left out %d of %d rows with too few fields", path, skipped, len(rows))
        table: dict[str, list] = {
            column: [fields[position] for _, fields in complete] for column, position in positions.items()
        }
        table["idx"] = [number for number, _ in complete]
        if "label" in table:
            table["label"] = read_labels(table["label"], self.label_names, str(path), columns["label"])
        else:
            table["label"] = [HIDDEN_LABEL] * len(complete)
        features = Features({column: Value("string") for column in self.columns})
        features["label"] = ClassLabel(names=list(self.label_names)) if self.label_names else Value("float32")
        features["idx"] = Value("int32")
        return to_dataset(pyarrow.table(table, schema=features.arrow_schema))


@dataclass(frozen=True)
class CommaSeparated:
    """CSV files with a header, such as E2E's; `columns` maps the task's columns to the header's."""

    files: Files
    columns: Mapping[str, str]

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the rows in file order.

        Raises:
            DataError: as `read_rows`.
        """
        rows = read_rows(path, self.columns.values())
        return rows.rename_columns({name: column for column, name in self.columns.items()})


@dataclass(frozen=True)
class DartJson:
    """DART's JSON files: a list of {tripleset, subtree_was_extended, annotations: [{source, text}]}."""

    files: Files

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the entries in file order.

        Raises:
            DataError: not UTF-8, not JSON, or not of that form.
        """
        try:
            entries = parse_json(read_text(path))
        except ValueError as error:
            raise DataError(f"{path} cannot be read as JSON: {error}. Download the file again.") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: expected a list of entries, each with 'tripleset' and 'annotations'")
        for index, entry in enumerate(entries):
            check_columns(list(entry), ("tripleset", "annotations"), f"{path}: entry {index} (counting from 0)")
        return _to_dart_dataset(entries, str(path))


@dataclass(frozen=True)
class WebNlgXml:
    """The XML of the WebNLG challenge 2017: a file, or a folder with files at any depth, read in order of name."""

    files: Files

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the entries of the file, or of all files of the folder.

        Raises:
            DataError: no file, not XML, or an entry that is not of the challenge's form.
        """
        files = sorted(path.rglob("*.xml")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path}: no .xml file in this folder; expected the challenge's, such as 1triples/*.xml")
        return _to_web_nlg_dataset([entry for file in files for entry in _entries(file)], str(path))


def dart_rows(rows: Dataset) -> Dataset:
    """Returns the hub's rows in the local layout: each text of `annotations` as a struct."""
    if len(rows) == 0 or not {"tripleset", "annotations"} <= set(rows.column_names):
        return rows
    if not isinstance(rows[0]["annotations"], Mapping):
        return rows
    adapted = rows.to_list()
    for row in adapted:
        texts = zip(row["annotations"]["source"], row["annotations"]["text"], strict=True)
        row["annotations"] = [{"source": source, "text": text} for source, text in texts]
    return _to_dart_dataset(adapted, "the hub's rows")


def web_nlg_rows(rows: Dataset) -> Dataset:
    """Returns the hub's rows in the local layout.

    The hub's test split repeats its 1,862 entries: all without texts, all with texts, and the unseen ones once more.
    Only the second kind is returned.
    """
    if not {"modified_triple_sets", "lex", "category"} <= set(rows.column_names):
        return rows
    with_texts = "testdata_with_lex"
    adapted = [
        {
            **row,
            "modified_triple_set": (_field(row["modified_triple_sets"], "mtriple_set") or [None])[0],
            **{f"lex_{name}": _field(row["lex"], name) for name in ("lid", "comment", "text")},
        }
        for row in rows.to_list()
        if (row.get("test_category") or with_texts) == with_texts
    ]
    return _to_web_nlg_dataset(adapted, "the hub's rows")


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{file} cannot be read as XML: {error}. Download the file again.") from error
    entries = list(root.iter("entry"))
    if not entries:
        raise DataError(f"{file}: no <entry>; expected the form of the WebNLG challenge 2017")
    for entry in entries:
        triples, texts = entry.find("modifiedtripleset"), entry.findall("lex")
        eid, category, size = entry.get("eid"), entry.get("category"), entry.get("size", "")
        if triples is None or category is None:
            missing = "attribute 'category'" if category is None else "element <modifiedtripleset>"
            raise DataError(f"{file}: the entry with eid={eid!r} has no {missing}")
        yield {
            "category": category,
            "size": int(size) if size.isdecimal() else None,
            "eid": eid,
            "modified_triple_set": [(triple.text or "").strip() for triple in triples.findall("mtriple")],
            "lex_lid": [text.get("lid") for text in texts],
            "lex_comment": [text.get("comment") for text in texts],
            "lex_text": [(text.text or "").strip() for text in texts],
        }


def _to_dart_dataset(rows: list[dict[str, Any]], origin: str) -> Dataset:
    import pyarrow as pa

    annotation = pa.struct({"source": pa.string(), "text": pa.string()})
    columns = {"subtree_was_extended": pa.bool_(), "annotations": pa.list_(annotation)}
    return _to_typed_dataset(rows, {"tripleset": pa.list_(pa.list_(pa.string())), **columns}, origin)


def _to_web_nlg_dataset(rows: list[dict[str, Any]], origin: str) -> Dataset:
    import pyarrow as pa

    columns = {"category": pa.string(), "size": pa.int32(), "eid": pa.string()}
    lists = ("modified_triple_set", "lex_lid", "lex_comment", "lex_text")
    return _to_typed_dataset(rows, {**columns, **dict.fromkeys(lists, pa.list_(pa.string()))}, origin)


def _to_typed_dataset(rows: list[dict[str, Any]], columns: dict[str, pyarrow.DataType], origin: str) -> Dataset:
    """Returns the rows with these columns; a key that a row lacks is null there, and other keys are dropped."""
    import pyarrow

    try:
        return to_dataset(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(columns)))
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{origin}: the entries do not have the types of the data set: {error}") from error


def _field(value: Any, name: str) -> list[Any]:
    """Returns a field of a list of structs, which `datasets` also stores as a struct of lists."""
    return list(value[name]) if isinstance(value, Mapping) else [item[name] for item in value]
