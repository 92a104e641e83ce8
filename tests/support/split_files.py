"""Files of rows written by hand, and what a task makes of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import DataError
from lora_hf.data.tasks.registry import task_of


def write(path: Path, columns: dict) -> Path:
    """A parquet file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_text(path: Path, text: str | bytes) -> Path:
    """A file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(task: str | TaskConfig, folder: Path | None, split: str = "train") -> Dataset:
    """One split of a task of ours, or of one that a config describes."""
    config = TaskConfig(task) if isinstance(task, str) else task
    return task_of(config).load(str(folder) if folder else None, [split])[split]


def columns(task: str | TaskConfig, folder: Path | None, split: str = "train") -> dict[str, list]:
    """The same by column."""
    rows = load(task, folder, split)
    return {column: rows[column][:] for column in rows.column_names}


def message(task: str | TaskConfig, folder: Path | None, split: str = "train") -> str:
    """Why the split cannot be read."""
    with pytest.raises(DataError) as error:
        load(task, folder, split)
    return str(error.value)
