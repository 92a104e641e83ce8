"""What the verbs say on standard output, and the bars they show on standard error."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_hf.core.errors import ConfigError

PAUSE = 30.0  # seconds between two lines of progress


def progress(items: Any, total: int | None = None) -> Any:
    """The items behind a progress bar; where standard error is no terminal a line on it now and then."""
    if not sys.stderr.isatty():
        return _with_lines(items, len(items) if total is None else total)
    from tqdm.auto import tqdm

    return tqdm(items, total=total, leave=False)


def _with_lines(items: Iterable[Any], total: int) -> Iterator[Any]:
    from lora_hf.core.formatting import minutes

    began = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= PAUSE:
            said = now
            print(f"{done:,} of {total:,}: {minutes((now - began) / done * (total - done))} left", file=sys.stderr)
        yield item


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option for the precision of a classifier that answers."""
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
        help="to compute in, default: that of the run; int8: merged and quantised, on the CPU",
    )


def shown(value: float | None) -> str:
    """A score with four decimals; null where there is none."""
    return "null" if value is None else f"{value:.4f}"


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes a JSON object a line.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from error


def check_record(path: Path | None) -> None:
    """Raises ConfigError, before anything is measured, where the folder of a record is not there."""
    if path and not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """What was measured, where a file was asked for."""
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line."""
    print(json.dumps(value, ensure_ascii=False))


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, a folder or a hub id, and `--revision` of the latter."""
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="outputs/<run>/adapter, or USER/NAME on the hub"
    )
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of USER/NAME")


def named_adapters(words: list[str]) -> dict[str, str]:
    """The folders or hub ids of words like NAME=DIR, by name.

    Raises:
        ConfigError: a word without a name, or with one that another has.
    """
    adapters: dict[str, str] = {}
    for word in words:
        name, equals, adapter = word.partition("=")
        if not (name and equals and adapter) or name in adapters:
            raise ConfigError(f"--adapter {word}: expected a name of its own for each: NAME=DIR")
        adapters[name] = adapter
    return adapters
