"""The values of a JSON or CSV column as an Arrow array, of one type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow

EXACT = 2**53  # the largest integer that a column of fractions holds exactly


def to_array(values: list[Any], column: str, path: Path) -> pyarrow.Array:
    """Returns the values of a column; raises a DataError with the first row of another type."""
    import pyarrow

    if not values:
        return pyarrow.array(values, pyarrow.string())
    try:
        array = pyarrow.array(values)
        if pyarrow.types.is_floating(array.type) and any(isinstance(value, bool) for value in values):
            raise ValueError("pyarrow reads true beside a fraction as 1")
        return array
    except UnicodeEncodeError as error:
        row = next(row for row, value in enumerate(values) if re.search("[\ud800-\udfff]", str(value)))
        raise DataError(
            f"{path}: row {row} (counting from 0): {column!r} holds half of a surrogate pair; write the whole character"
        ) from error
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        row, expected = _first_of_another_type(values)
        large = next((row for row, each in enumerate(values) if isinstance(each, int) and abs(each) > EXACT), None)
        if row is None and large is not None:
            raise DataError(
                f"{path}: {column!r}: row {large} (counting from 0) has the integer {str(values[large])[:100]}, which "
                "is too large for a column of numbers; write it as a text or a fraction"
            ) from error
        row = row or 0
        raise DataError(
            f"{path}: {column!r} has values of several types: row {row} (counting from 0) has {values[row]!r:.100}; "
            f"expected {expected}"
        ) from error


def _first_of_another_type(values: list[Any]) -> tuple[int | None, str]:
    """Returns the first row whose value is not of the type of the first one, if any, and what that is in words."""
    kinds = [_kind(value) for value in values]
    first = next((kind for kind in kinds if kind not in (None, _MIXED)), "a list of one type")
    others = (row for row, kind in enumerate(kinds) if kind not in (None, first))
    return next(others, None), f"{first}, as in the rows before"


_MIXED = "a list of several types"
_KINDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", dict: "an object"}


def _kind(value: Any) -> str | None:
    """The type of a value in words; None if it fits every type."""
    if not isinstance(value, list):
        return _KINDS.get(type(value))
    inner = {kind for item in value if (kind := _kind(item)) is not None}
    return f"a list with {inner.pop()}" if len(inner) == 1 else _MIXED if inner else None
