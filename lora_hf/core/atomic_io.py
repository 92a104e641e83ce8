"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_hf.core.errors import ConfigError


def check_output_folder(folder: Path, mark: str, overwrite: bool = False) -> None:
    """Raises ConfigError where `folder` is in the way: a file, or a folder that is not empty.

    With `overwrite` a folder that holds the file `mark`, written by the same verb before, is not in the way.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ConfigError(f"output {folder}: expected a folder, found a file; choose another")
    ours = (folder / mark).is_file()
    if overwrite and ours:
        return
    if overwrite:
        raise ConfigError(f"output {folder}: holds no {mark}, so overwrite does not replace it; choose another folder")
    hint = ", or pass overwrite=True to replace it" if ours else ""
    raise ConfigError(f"output {folder}: exists and is not empty; choose another folder{hint}")


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


@contextmanager
def atomic_folder(folder: Path, mark: str, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name at the end; after an error nothing is left of it.

    Raises:
        ConfigError: as `check_output_folder`; also a place where nothing can be written.
    """
    check_output_folder(folder, mark, overwrite)
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"output {folder}: cannot be written: {error.strerror}") from error
    aside = room / "new"
    try:
        aside.mkdir()  # in a room of its own: mkdtemp lets nobody else read what it makes
        yield aside
        if folder.is_dir():
            folder.replace(room / "old")
        aside.replace(folder)
    finally:
        shutil.rmtree(room, ignore_errors=True)
