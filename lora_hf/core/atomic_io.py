"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_hf.core.errors import ConfigError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`: renamed onto `path` at a clean end, removed after an error."""
    tmp = path.with_name(f"{path.name}.part")
    try:
        yield tmp
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes `value` as JSON in UTF-8, with a final newline."""
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output_folder(folder: Path, marker: str, overwrite: bool = False) -> None:
    """Checks that `folder` is free: missing, empty, or, with `overwrite`, an earlier output that holds `marker`.

    Raises:
        ConfigError: it is a file, or a folder that must not be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ConfigError(f"output {folder}: expected a folder, found a file; choose another")
    replaceable = (folder / marker).is_file()
    if overwrite and replaceable:
        return
    if overwrite:
        raise ConfigError(
            f"output {folder}: holds no {marker}, so overwrite does not replace it; choose another folder"
        )
    hint = ", or pass overwrite=True to replace it" if replaceable else ""
    raise ConfigError(f"output {folder}: exists and is not empty; choose another folder{hint}")


@contextmanager
def atomic_folder(folder: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`: renamed onto `folder` at a clean end, removed after an error.

    Raises:
        ConfigError: as `check_output_folder`; also where the parent folder cannot be written.
    """
    check_output_folder(folder, marker, overwrite)
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"output {folder}: cannot be written: {error.strerror}") from error
    try:
        new = workspace / "new"
        new.mkdir()  # with the usual permissions: only the owner can read what mkdtemp creates
        yield new
        if folder.is_dir():
            folder.replace(workspace / "old")
        new.replace(folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
