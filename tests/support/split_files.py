"""Writes files of splits by hand, and reads them through a task."""

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
    """Writes a parquet file and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_text(path: Path, text: str | bytes) -> Path:
    """Writes a file and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(task: str | TaskConfig, folder: Path | None, split: str = "train") -> Dataset:
    """One split of a built-in task, or of a task that a config describes."""
    config = TaskConfig(task) if isinstance(task, str) else task
    return task_of(config).load(str(folder) if folder else None, [split])[split]


def columns(task: str | TaskConfig, folder: Path | None, split: str = "train") -> dict[str, list]:
    """The columns of a split by name."""
    rows = load(task, folder, split)
    return {column: rows[column][:] for column in rows.column_names}


def message(task: str | TaskConfig, folder: Path | None, split: str = "train") -> str:
    """The error message of a split that cannot be read."""
    with pytest.raises(DataError) as error:
        load(task, folder, split)
    return str(error.value)
