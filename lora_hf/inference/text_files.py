"""The files that hold generated texts. Commands check them before they import torch."""

from __future__ import annotations

from pathlib import Path

from lora_hf.core.errors import ConfigError


def text_files(path: Path) -> tuple[Path, Path]:
    """The files that `write_texts` writes for `path`: one with a text per line, and the `.jsonl` file of its name."""
    return path.with_suffix(".txt") if path.suffix == ".jsonl" else path, path.with_suffix(".jsonl")


def check_text_files(path: Path, source: Path) -> None:
    """Raises a ConfigError if `write_texts` would replace the file of prompts, `source`."""
    for file in text_files(path):
        if file.resolve() == source.resolve():
            which = "this" if file == path else f"{file}, which is written too,"
            raise ConfigError(f"--output {path}: {which} is the --input file, which it would replace; name another")
