"""The classes of a custom task whose config does not name them: those of its training rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import DataError
from lora_hf.data.readers import read_rows
from lora_hf.data.tasks.custom import KINDS, CustomFiles
from lora_hf.data.tasks.multi_label import are_indicators, label_sets
from lora_hf.data.tasks.row_checks import class_names, explain_one_object, without_fraction

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

INFERRED_KINDS = ("classification", "multi_label")
FEW_CLASSES = 20  # more of them must each have two rows on average


def infer_label_names(config: TaskConfig) -> TaskConfig:
    """Returns the config with `label_names`, in alphabetical or numerical order; one that has them, unchanged.

    Raises:
        DataError: no training file, or values that are no classes.
    """
    if config.kind not in INFERRED_KINDS or config.label_names is not None:
        return config
    if config.label_columns is not None:
        return replace(config, label_names=config.label_columns)
    column = config.label_column or KINDS[config.kind].label_column
    path = CustomFiles(config).file("train", config.data_dir)
    described = replace(config, label_column=column, data_dir=None)
    names = _names(described, path, path.stat().st_mtime_ns, path.stat().st_size)
    return replace(config, label_names=names)


@lru_cache(maxsize=16)
def _names(config: TaskConfig, path: Path, changed: int, size: int) -> tuple[str, ...]:
    """`changed` and `size` are those of the file: a run asks several times, another file is read again."""
    column = config.label_column or ""
    values = _labels(config, read_rows(path, (column,)), path)
    found = {_name(value, config, path) for value in values if value is not None and str(value).strip()}
    whole = {without_fraction(name) for name in found}
    names = _sorted(found if whole & found else whole)  # 1.0 beside 1.5, or beside 1, is a text like any other
    if len(names) < 2:
        raise DataError(
            f"{path}: expected two or more classes in column {column!r}, found {', '.join(names) or 'none'} in "
            f"{len(values)} rows; set another task.label_column, or list the classes in task.label_names"
        )
    if len(names) > FEW_CLASSES and 2 * len(names) > len(values):
        raise DataError(
            f"{path}: column {column!r} has {len(names)} different values in {len(values)} rows, too "
            "many for classes; set another task.label_column or task.kind, or list the classes in task.label_names"
        )
    _log.info("task.label_names, from the rows of %s: %s", path, ", ".join(names))
    return names


def _labels(config: TaskConfig, rows: Dataset, path: Path) -> list[Any]:
    if config.kind == "multi_label":
        sets = list(label_sets(config, rows, path))
        if sets and are_indicators(sets, len(sets[0])):
            raise DataError(
                f"{path}: column {config.label_column!r} has a 0 or 1 for each of {len(sets[0])} labels; set "
                "task.label_names to their names, in this order"
            )
        return [label for labels in sets for label in labels]
    values = class_names(rows, config.label_column or "")
    if hint := explain_one_object(values):
        raise DataError(f"{path}: column {config.label_column!r} holds {values[0]!r:.100}{hint}")
    return values


def _name(value: Any, config: TaskConfig, path: Path) -> str:
    if not isinstance(value, (str, int)) and not (isinstance(value, float) and value.is_integer()):
        raise DataError(
            f"{path}: column {config.label_column!r} holds {value!r:.100}; expected classes, which are texts or whole "
            "numbers; for numbers to predict set task.kind=regression"
        )
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    found = sorted(names)
    return tuple(sorted(found, key=int) if all(name.isdecimal() for name in found) else found)
