"""The files that hold generated texts. Commands check them before they import torch."""

from __future__ import annotations

from pathlib import Path

from lora_hf.core.errors import ConfigError


def text_files(path: Path) -> tuple[Path, Path]:
    """The files that `write_texts` writes for `path`: one with a text per line, and the `.jsonl` file of its name."""
    return path.with_suffix(".txt") if path.suffix == ".jsonl" else path, path.with_suffix(".jsonl")


def check_text_files(path: Path, source: Path | None = None) -> None:
    """Raises a ConfigError if `write_texts` cannot write these files, or would replace the prompts, `source`."""
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: no such folder {path.parent}; create it first")
    for file in text_files(path):
        which = "this" if file == path else f"{file}, which is written too,"
        if file.is_dir():
            raise ConfigError(f"--output {path}: {which} is a folder; name a file")
        if source is not None and file.resolve() == source.resolve():
            raise ConfigError(f"--output {path}: {which} is the --input file, which it would replace; name another")
