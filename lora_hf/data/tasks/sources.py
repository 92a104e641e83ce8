"""Where a task's rows come from, and the checks that they pass before a model sees them.

The order is `task.data_dir`, else `$LORA_HF_DATA_DIR`, else the hub. A folder, once named, is the only source: falling
through to the hub would train on other rows than the ones asked for. Local files are read into memory; nothing is
written. A split whose name starts with "test" may hide its labels, as the hub's GLUE does (-1 on every row).
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from lora_hf.core.errors import DataError, HubError, did_you_mean
from lora_hf.core.hub_access import hub_is_reachable

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from datasets import Dataset

DATA_DIR_VARIABLE = "LORA_HF_DATA_DIR"
HIDDEN_LABEL = -1
LONGEST_TEXT = 1_000_000  # a tokenizer takes a hundred times as much memory

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Anything that holds a task's splits."""

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        """Returns the rows of `split`, and in words where they came from (a path, a hub id)."""
        ...


class OriginalFiles(Protocol):
    """The files of a data set as its authors published them."""

    @property
    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        """Split name -> path below the data folder, or the paths where it may lie; a folder is one as well."""
        ...

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the file's rows under the names of the parquet columns."""
        ...


@dataclass(frozen=True)
class Embedded:
    """Rows that a function of this package makes: `rows(split)` -> one dict a row. `data_dir` does not matter here."""

    rows: Callable[[str], list[dict]]

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        from datasets import Dataset

        return Dataset.from_list(self.rows(split)), f"the {split!r} rows made by {self.rows.__name__}"


def named_folder(data_dir: str | None) -> tuple[str | None, str]:
    """Returns the data folder that is named, if any, and what names it."""
    if data_dir:
        return data_dir, "task.data_dir"
    return os.environ.get(DATA_DIR_VARIABLE) or None, DATA_DIR_VARIABLE


def _as_they_are(rows: Dataset) -> Dataset:
    return rows


@dataclass(frozen=True)
class LocalOrHub:
    """A data set of the hub that may also lie in a local folder.

    `folder` is where its parquet files are looked for below the data folder ("glue/sst2", and "sst2" alone), named
    `<split>.parquet` or as the hub names them, `<split>-00000-of-00001.parquet`. `hub_folder` is for a converted branch
    of the hub: its configurations are folders there. `adapt` turns the hub's columns into the task's.
    """

    folder: str
    hub_id: str
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_folder: str | None = None
    adapt: Callable[[Dataset], Dataset] = _as_they_are
    originals: OriginalFiles | None = None

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        """Returns the rows and where they came from.

        Raises:
            DataError: the folder, the split or the file is missing or unreadable.
            HubError: no folder is named, and neither the hub nor its local cache gives the rows.
        """
        if PurePosixPath(split).name != split:
            raise DataError(f"{split!r}: expected the name of a split, without a path")
        name, setting = named_folder(data_dir)
        if not name:
            return self.adapt(self._from_hub(split)), f"{self._hub_name()} on the hub, split {split!r}"
        root = Path(name).expanduser()
        if not root.is_dir():
            raise DataError(f"{setting}={name} is not a folder. {self._how_to_set_up(split)}")
        for candidate in self._parquet_files(split):
            if (root / candidate).is_file():
                return self.adapt(read_parquet(root / candidate)), str(root / candidate)
        for candidate in self._original_files(split):
            if self.originals and (root / candidate).exists():
                return self.originals.read(root / candidate, split), str(root / candidate)
        looked_for = ", ".join([*self._parquet_files(split), *self._original_files(split)])
        raise DataError(
            f"no rows of {self.folder}, split {split!r}, in {root} ({setting}); looked for: {looked_for}; "
            f"splits found there: {', '.join(self._splits_in(root)) or 'none'}. {self._how_to_set_up(split)}"
        )

    def _parquet_files(self, split: str) -> list[str]:
        folders = dict.fromkeys((self.folder, PurePosixPath(self.folder).name))
        return [f"{folder}/{split}{shard}.parquet" for folder in folders for shard in ("", "-00000-of-00001")]

    def _original_files(self, split: str) -> list[str]:
        if self.originals is None or split not in self.originals.files:
            return []
        named = self.originals.files[split]
        parent = PurePosixPath(self.folder).parent
        paths = ((path, str(parent / path)) for path in ((named,) if isinstance(named, str) else named))
        return list(dict.fromkeys(place for places in paths for place in places))

    def _hub_name(self) -> str:
        return " ".join(filter(None, (self.hub_id, self.hub_config, self.hub_folder)))

    def _splits_in(self, root: Path) -> list[str]:
        splits = {
            path.stem.removesuffix("-00000-of-00001")
            for folder in (self.folder, PurePosixPath(self.folder).name)
            for path in (root / folder).glob("*.parquet")
        }
        if self.originals:
            files = ((split, path) for split in self.originals.files for path in self._original_files(split))
            splits |= {split for split, path in files if (root / path).exists()}
        return sorted(splits)

    def _how_to_set_up(self, split: str) -> str:
        originals = "".join(f" or DIR/{path}" for path in self._original_files(split)[:1])
        return (
            f"Set task.data_dir=DIR or {DATA_DIR_VARIABLE}=DIR to a folder with DIR/{self._parquet_files(split)[0]}"
            f"{originals}; with neither set the rows come from the hub."
        )

    def _from_hub(self, split: str) -> Dataset:
        from datasets import config, load_dataset
        from datasets.packaged_modules.cache.cache import Cache
        from huggingface_hub import constants

        wanted = self._hub_name()
        if not hub_is_reachable():
            # `load_dataset` looks into its cache as well, but only after asking the hub for 20 seconds and more.
            try:
                name = PurePosixPath(self.hub_id).name
                cached = Cache(
                    None, name, self.hub_config, "auto", "auto", repo_id=self.hub_id, data_dir=self.hub_folder
                )
                return cached.as_dataset(split=split)  # pyright: ignore[reportReturnType]: one split, one Dataset
            except (ValueError, OSError) as error:
                raise HubError(
                    f"{wanted}, split {split!r}: the hub ({constants.ENDPOINT}) is out of reach or switched off "
                    f"(HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), and the local cache ({config.HF_DATASETS_CACHE}) "
                    f"does not hold it. {self._how_to_set_up(split)}"
                ) from error
        try:
            return load_dataset(  # pyright: ignore[reportReturnType]
                self.hub_id, self.hub_config, data_dir=self.hub_folder, split=split, revision=self.hub_revision
            )
        except Exception as error:  # datasets, fsspec and the http client each raise their own kinds here
            raise HubError(
                f"{wanted}, split {split!r}: the hub ({constants.ENDPOINT}) did not give it; "
                f"{type(error).__name__}: {error}. Try again, or work offline. {self._how_to_set_up(split)}"
            ) from error


@dataclass(frozen=True)
class TabSeparated:
    """Original files in UTF-8, one row a line, fields between tabs, quotes meaning nothing (`csv.QUOTE_NONE`).

    `columns` maps the hub's column to the name in the file's header. `header` names the columns of files that have none
    (CoLA's, other than test). A label is written as one of `label_names` or as a number.
    """

    files: Mapping[str, str]
    columns: Mapping[str, str]
    label_names: tuple[str, ...]
    header: tuple[str, ...] = ()

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the rows in file order with the hub's types, and as `idx` the row's number.

        Rows with fewer fields than the columns need are left out, as the hub's own conversion did, and counted in a
        warning: the original QQP has some.

        Raises:
            DataError: not UTF-8, no such column, a label that is neither a name nor a number.
        """
        import pyarrow
        from datasets import ClassLabel, Features, Value

        lines = csv.reader(io.StringIO(decode(path), newline=None), delimiter="\t", quoting=csv.QUOTE_NONE)
        is_test = split.startswith("test")
        header = self.header if self.header and not is_test else tuple(next(lines, ()))
        wanted = dict(self.columns)
        if is_test and wanted["label"] not in header:
            del wanted["label"]
        check_columns(header, wanted.values(), str(path))
        positions = {column: header.index(name) for column, name in wanted.items()}
        needed = 1 + max(positions.values())

        rows = [fields for fields in lines if fields]
        whole = [(number, fields) for number, fields in enumerate(rows) if len(fields) >= needed]
        if len(whole) < len(rows):
            _log.warning("%s: left out %d of %d rows with too few fields", path, len(rows) - len(whole), len(rows))
        table: dict[str, list] = {
            column: [fields[position] for _, fields in whole] for column, position in positions.items()
        }
        table["idx"] = [number for number, _ in whole]
        if "label" in table:
            table["label"] = self._labels(table["label"], path)
        else:
            table["label"] = [HIDDEN_LABEL] * len(whole)
        features = Features({column: Value("string") for column in self.columns})
        features["label"] = ClassLabel(names=list(self.label_names)) if self.label_names else Value("float32")
        features["idx"] = Value("int32")
        return in_memory(pyarrow.table(table, schema=features.arrow_schema))

    def _labels(self, written: list[str], path: Path) -> list[float | None]:
        numbers = {label: self._number(label) for label in dict.fromkeys(written)}
        wrong = next((label for label, number in numbers.items() if number is None), None)
        if wrong is not None:
            expected = f"one of {', '.join(self.label_names)}, or its number" if self.label_names else "a number"
            raise DataError(
                f"{path}: unknown label {wrong!r}{did_you_mean(wrong, self.label_names)}, first on row "
                f"{written.index(wrong)} (counting from 0); expected {expected}"
            )
        return [numbers[label] for label in written]

    def _number(self, label: str) -> float | None:
        if label in self.label_names:
            return self.label_names.index(label)
        try:
            return int(label) if self.label_names else float(label)
        except ValueError:
            return None


def read_parquet(path: Path) -> Dataset:
    """Returns the rows of one parquet file, held in memory.

    Raises:
        DataError: not a parquet file, or a damaged one.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        return in_memory(parquet.read_table(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}. Download or write the file again.") from error


def check_text(rows: Dataset, where: str, columns: tuple[str, ...]) -> None:
    """Checks that there are rows and that each of `columns` is text, without nulls; `where` opens every message.

    Raises:
        DataError: naming the column, what was expected and what was found.
    """
    from pyarrow.compute import call_function

    if len(rows) == 0:
        raise DataError(f"{where}: no rows; expected at least one")
    check_columns(rows.column_names, columns, where)
    for column in columns:
        kind = getattr(rows.features[column], "dtype", rows.features[column])
        if kind not in ("string", "large_string"):
            raise DataError(f"{where}: column {column!r} should hold text (string), found {kind}")
        _refuse(rows, column, _is_null(rows, column), where, "expected text")
        lengths = call_function("binary_length", [rows.data.column(column)]).to_numpy()
        _refuse(rows, column, lengths > LONGEST_TEXT, where, f"expected a text of at most {LONGEST_TEXT:,} bytes")


def check_labels(
    rows: Dataset, where: str, split: str, label_names: tuple[str, ...], lowest: float, highest: float
) -> None:
    """Checks the column `label`: class ids in the order of `label_names`, or scores `lowest` .. `highest` without it.

    On a test split the column may be missing, or hold -1 on every row.

    Raises:
        DataError: naming how many rows are wrong, the first of them, and what is allowed.
    """
    is_test = split.startswith("test")
    if is_test and "label" not in rows.column_names:
        return
    check_columns(rows.column_names, ("label",), where)
    feature = rows.features["label"]
    kind = str(getattr(feature, "dtype", feature))
    if not kind.startswith(("int", "uint") if label_names else ("float", "int", "uint")):
        expected = f"class ids (integers, {_numbered(label_names)})" if label_names else "numbers"
        raise DataError(f"{where}: column 'label' should hold {expected}, found {kind}")
    found_names = tuple(getattr(feature, "names", label_names))
    if found_names != label_names:
        raise DataError(f"{where}: the labels should be {_numbered(label_names)}, found {_numbered(found_names)}")
    _refuse(rows, "label", _is_null(rows, "label"), where, "expected a label")
    labels = rows.data.column("label").to_numpy()
    if is_test and lowest > HIDDEN_LABEL and (labels == HIDDEN_LABEL).all():
        return
    outside = ~((labels >= lowest) & (labels <= highest))  # not "below or above", so that NaN is refused as well
    expected = f"allowed: {_numbered(label_names)}" if label_names else f"allowed: {lowest:g} to {highest:g}"
    if not is_test and lowest > HIDDEN_LABEL and HIDDEN_LABEL in labels:
        expected += f"; hidden labels ({HIDDEN_LABEL}) are only for test splits"
    _refuse(rows, "label", outside, where, expected)


def check_columns(found: Sequence[str], wanted: Iterable[str], where: str) -> None:
    """Raises a DataError for the first of `wanted` that is not among `found`, with the nearest name."""
    for column in wanted:
        if column not in found:
            raise DataError(
                f"{where}: no column {column!r}{did_you_mean(column, found)}; found: {', '.join(found) or 'none'}"
            )


def _is_null(rows: Dataset, column: str) -> np.ndarray:
    return rows.data.column(column).is_null().to_numpy()


def _refuse(rows: Dataset, column: str, wrong: np.ndarray, where: str, expected: str) -> None:
    count = int(wrong.sum())
    if count:
        first = int(wrong.argmax())
        value = rows.data.column(column)[first].as_py()
        raise DataError(
            f"{where}: {count} of {len(rows)} rows have a wrong {column!r}, the first is row {first} "
            f"(counting from 0): {value!r:.100}; {expected}"
        )


def _numbered(names: tuple[str, ...]) -> str:
    return ", ".join(f"{index} {name}" for index, name in enumerate(names))


def decode(path: Path) -> str:
    """Returns the text of a UTF-8 file; a DataError names the line of a byte that is none."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # the original MRPC opens with a byte-order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} in line {line}. Save the file as UTF-8."
        ) from error


def in_memory(table: pyarrow.Table) -> Dataset:
    """Returns the rows of a table, held in memory."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table))
