"""What a value of `task.kind` means: the columns of its files, its checks, and the task it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.data.readers import TABLE_SUFFIXES, read_rows
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.row_checks import check_text
from lora_hf.data.tasks.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset


def read_columns(config: TaskConfig, path: Path) -> Dataset:
    """Returns the text columns and the label column, or columns, of a file."""
    labels = config.label_columns or (config.label_column or "",)
    return read_rows(path, (*(config.text_columns or ()), *labels))


def text_arrays(config: TaskConfig, rows: Dataset, path: Path) -> dict[str, Any]:
    """Returns the text columns of a file, checked, as columns of a table."""
    import pyarrow

    texts = config.text_columns or ()
    check_text(rows, str(path), texts)
    return {column: rows.data.column(column).cast(pyarrow.string()) for column in texts}


def text_columns_of(config: TaskConfig) -> tuple[str, ...]:
    return config.text_columns or ()


def inputs_of(config: TaskConfig, rows: Dataset) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[column][:] for column in text_columns_of(config)), strict=True))


def check_no_classes(config: TaskConfig) -> list[str]:
    return [f"task.label_names: task.kind={config.kind} has no classes; leave it out"] if config.label_names else []


@dataclass(frozen=True)
class Kind:
    """The description of a kind of custom task.

    Attributes:
        text_columns, label_column: of the files, by default.
        metrics: what `task.metric` may be; the first is the default.
        build: makes the task of a config whose columns are set, and of the source of its rows.
        check: returns what is wrong with such a config; by default that it names classes.
        max_texts: how many text columns a row may have.
        read: returns the rows of the task from a file; by default its text columns and its label column.
        inputs: what the model reads of each row that `read` returns; by default its text columns.
        suffixes: of such files.
        keys: of the `task` section that only some kinds have, and this one does.
    """

    text_columns: tuple[str, ...]
    label_column: str
    metrics: tuple[str, ...]
    build: Callable[[TaskConfig, Source], Task]
    check: Callable[[TaskConfig], list[str]] = check_no_classes
    max_texts: int = 2
    read: Callable[[TaskConfig, Path], Dataset] = read_columns
    inputs: Callable[[TaskConfig, Dataset], Sequence[Any]] = inputs_of
    suffixes: tuple[str, ...] = TABLE_SUFFIXES
    keys: tuple[str, ...] = ()
