"""Checks that rows pass before a model sees them. Every message begins with the rows' origin."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError, did_you_mean
from lora_hf.core.labels import HIDDEN_LABEL

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

LONGEST_TEXT = 1_000_000  # bytes; a tokenizer takes a hundred times as much memory
ONE_OBJECT = (
    "; the file is one JSON object: expected an array of objects or an object on each line, one for each row, such as "
    "pandas writes with orient='records'"
)


def nfc(text: str) -> str:
    """Returns Unicode's composed form: `e` with a combining accent and `é` are the same name."""
    return unicodedata.normalize("NFC", text)


def check_columns(found: Sequence[str], required: Iterable[str], origin: str, hint: str = "") -> None:
    """Raises a DataError for the first of `required` that is not among `found`, with the nearest name and `hint`."""
    for column in required:
        if column not in found:
            names = ", ".join(f"{name:.100}" for name in found[:50]) or "none"
            raise DataError(f"{origin}: no column {column!r}{did_you_mean(column, found)}; found: {names}{hint}")


def wrong_value(path: Path, row: int, column: str, expected: str, found: str) -> DataError:
    """Returns the error about one value of a file."""
    return DataError(f"{path}: row {row} (counting from 0), column {column!r}: expected {expected}; found {found:.300}")


def explain_one_object(values: Sequence[Any]) -> str:
    """Returns a hint for the only value of a column that is a list or an object: a file of columns instead of rows."""
    return ONE_OBJECT if len(values) == 1 and isinstance(values[0], (list, dict)) else ""


def check_filled(text: Any, path: Path, row: int, column: str) -> None:
    """Raises a DataError for a value of a file that is no text, an empty one, or one that is too long."""
    if not isinstance(text, str) or not text.strip():
        raise wrong_value(path, row, column, "a text", f"{text!r:.100}")
    if len(text) > LONGEST_TEXT:
        raise wrong_value(path, row, column, f"a text of at most {LONGEST_TEXT:,} characters", f"{len(text):,}")


def check_any(rows: Sequence[Any] | Dataset, origin: str | Path) -> None:
    """Raises a DataError if there are no rows."""
    if len(rows) == 0:
        raise DataError(f"{origin}: no rows; expected at least one")


def check_text(rows: Dataset, origin: str, columns: tuple[str, ...]) -> None:
    """Checks that there are rows and that each of `columns` holds text, without nulls.

    Raises:
        DataError: naming the column, what was expected and what was found.
    """
    from pyarrow.compute import call_function

    check_any(rows, origin)
    check_columns(rows.column_names, columns, origin)
    for column in columns:
        kind = getattr(rows.features[column], "dtype", rows.features[column])
        if kind not in ("string", "large_string"):
            one_object = explain_one_object(rows[column][:])
            raise DataError(f"{origin}: column {column!r} should hold text (string), found {kind}{one_object}")
        _refuse(rows, column, _is_null(rows, column), origin, "expected text")
        lengths = call_function("binary_length", [rows.data.column(column)]).to_numpy()
        _refuse(rows, column, lengths > LONGEST_TEXT, origin, f"expected a text of at most {LONGEST_TEXT:,} bytes")


def check_labels(
    rows: Dataset, origin: str, split: str, label_names: tuple[str, ...], lowest: float, highest: float
) -> None:
    """Checks the column `label`: class ids in the order of `label_names`, or without them scores `lowest` .. `highest`.

    A split whose name starts with "test" may lack the column, or hide all labels as -1 if -1 is no score.

    Raises:
        DataError: naming how many rows are wrong, the first of them, and what is allowed.
    """
    is_test = split.startswith("test")
    if is_test and "label" not in rows.column_names:
        return
    check_columns(rows.column_names, ("label",), origin)
    feature = rows.features["label"]
    kind = str(getattr(feature, "dtype", feature))
    if not kind.startswith(("int", "uint") if label_names else ("float", "int", "uint")):
        expected = f"class ids (integers, {_numbered(label_names)})" if label_names else "numbers"
        raise DataError(f"{origin}: column 'label' should hold {expected}, found {kind}")
    found_names = tuple(getattr(feature, "names", label_names))
    if found_names != label_names:
        raise DataError(f"{origin}: the labels should be {_numbered(label_names)}, found {_numbered(found_names)}")
    _refuse(rows, "label", _is_null(rows, "label"), origin, "expected a label")
    labels = rows.data.column("label").to_numpy()
    may_hide = lowest > HIDDEN_LABEL
    if is_test and may_hide and (labels == HIDDEN_LABEL).all():
        return
    invalid = ~((labels >= lowest) & (labels <= highest))  # also NaN
    expected = f"allowed: {_numbered(label_names) if label_names else f'{lowest:g} to {highest:g}'}"
    if not is_test and may_hide and HIDDEN_LABEL in labels:
        expected += f"; hidden labels ({HIDDEN_LABEL}) are only for test splits"
    _refuse(rows, "label", invalid, origin, expected)


def class_names(rows: Dataset, column: str) -> list[Any]:
    """Returns the values of a column; the ids of a file that names its classes become names, also those in lists."""
    feature = rows.features[column]
    names: Any = getattr(getattr(feature, "feature", feature), "names", None)
    if names is None:
        return rows[column][:]

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(each) for each in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    return [name(value) for value in rows[column]]


def read_labels(
    values: Sequence[Any], names: Sequence[str], origin: str, column: str, setting: str = "the classes"
) -> list[float]:
    """Returns the class ids of the classes or ids in a column of a file, or without `names` its scores.

    Args:
        setting: what errors call `names`.

    Raises:
        DataError: a value is none of these, with its row and the nearest class.
    """
    composed = [nfc(name) for name in names]
    labels = {(type(value), str(value)): label_of(value, composed) for value in values}
    found = [labels[type(value), str(value)] for value in values]
    if None in found:
        row = found.index(None)
        expected = f"one of {setting} ({', '.join(names)})" if names else "a number"
        counts = ", ".join(f"{name} ({count})" for name, count in Counter(map(str, values)).most_common(10))
        raise DataError(
            f"{origin}: row {row} (counting from 0) has the label {values[row]!r:.100} in column {column!r}; expected "
            f"{expected}{did_you_mean(str(values[row]), names) if isinstance(values[row], str) else ''}"
            f"{f'; the column holds {counts}' if names else ''}{explain_one_object(values)}"
        )
    return found  # pyright: ignore[reportReturnType]: no None is left


def label_of(value: Any, names: Sequence[str]) -> float | None:
    """Returns the id of a class or id as a file holds it, or without `names` the score; None if it is neither."""
    if value is None or value != value:  # a class may be called None or nan
        return None
    if not names:
        try:
            return None if isinstance(value, bool) or "_" in str(value) else float(value)  # Python reads 1_0 as 10
        except (TypeError, ValueError):
            return None
    text = nfc(str(value))
    if isinstance(value, bool) and text not in names:
        text = text.lower()  # as JSON writes it
    if text not in names:
        text = text.strip()
    if text not in names:
        text = without_fraction(text)
    if text in names:
        return names.index(text)
    # If the classes are called 1 to 5, a 0 is a mistake and not a class id.
    is_id = text.isdecimal() and not any(name.isdecimal() for name in names)
    return int(text) if is_id and int(text) < len(names) else None


def without_fraction(text: str) -> str:
    """Returns 1 for 1.0, as pandas writes whole numbers in a column that has or had gaps; other texts unchanged."""
    return re.sub(r"(?a)\A(-?\d+)\.0+\Z", r"\1", text)


def _is_null(rows: Dataset, column: str) -> np.ndarray:
    return rows.data.column(column).is_null().to_numpy()


def _refuse(rows: Dataset, column: str, invalid: np.ndarray, origin: str, expected: str) -> None:
    count = int(invalid.sum())
    if count:
        first = int(invalid.argmax())
        value = rows.data.column(column)[first].as_py()
        raise DataError(
            f"{origin}: {count} of {len(rows)} rows have a wrong {column!r}, the first is row {first} "
            f"(counting from 0): {value!r:.100}; {expected}"
        )


def _numbered(names: tuple[str, ...]) -> str:
    return ", ".join(f"{index} {name}" for index, name in enumerate(names))
