"""Options that several verbs share, their output, and progress on standard error."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lora_hf.core.errors import ConfigError, how_to_install
from lora_hf.core.progress import ProgressTimer


def progress(items: Any, total: int | None = None) -> Any:
    """The items behind a progress bar on standard error; with occasional lines instead if that is not a terminal."""
    if not sys.stderr.isatty():
        return _with_lines(items, len(items) if total is None else total)
    from tqdm.auto import tqdm

    return tqdm(items, total=total, leave=False)


def _with_lines(items: Iterable[Any], total: int) -> Iterator[Any]:
    timer = ProgressTimer()
    for done, item in enumerate(items):
        if done and timer.is_due():
            print(f"{done:,} of {total:,}: {timer.time_left(done, total - done)}", file=sys.stderr)
        yield item


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="outputs/<run>/adapter, or USER/NAME on the hub"
    )
    add_revision(parser)
    add_model(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME_OR_FOLDER", help="folder or hub id of the base; default: as recorded in the adapter"
    )


def add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of USER/NAME")


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
        help="precision of the base; default: as in the run; int8 merges a classifier and quantizes it (CPU only)",
    )


def add_exact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exact", action="store_true", help="run in fp32, and dequantize a quantized base")


def check_exact(options: argparse.Namespace) -> None:
    """Raises a ConfigError for `--exact` with a precision that is not exact."""
    if options.exact and options.precision not in (None, "fp32"):
        raise ConfigError(f"--exact runs in fp32; leave out --precision {options.precision}")


def add_data_dir(parser: argparse.ArgumentParser, first: str) -> None:
    """Adds `--data-dir`; `first` says whose folder comes before those of the environment and the hub."""
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help=f"folder with the data; default: the one in {first}, else $LORA_HF_DATA_DIR, else the hub",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")


def require_packages(verb: str, extra: str, packages: Iterable[str]) -> None:
    """Raises ConfigError if a package of an extra is missing, before importing others takes seconds."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{verb} needs {', '.join(missing)}: {how_to_install(extra)}")


def parse_named_adapters(arguments: list[str]) -> dict[str, str]:
    """Maps the name of each NAME=DIR argument to its folder or hub id.

    Raises:
        ConfigError: an argument without a name, or two with the same name.
    """
    adapters: dict[str, str] = {}
    for argument in arguments:
        name, _, adapter = argument.partition("=")
        if not (name and adapter):
            raise ConfigError(f"--adapter {argument}: expected NAME=DIR, such as sst2={argument.strip('=')}")
        if name in adapters:
            raise ConfigError(f"--adapter {argument}: {name!r} is the name of another adapter; expected NAME=DIR")
        adapters[name] = adapter
    return adapters


def format_score(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def print_json(value: dict[str, Any]) -> None:
    """Prints a JSON object on one line."""
    print(json.dumps(value, ensure_ascii=False))


def print_rows(options: argparse.Namespace, key: str, rows: list[dict[str, Any]], lines: Iterable[str]) -> None:
    """Prints a verb's results as `lines` or as JSON, or only their number if they were written to `options.output`."""
    if options.output is not None:
        print(f"wrote {len(rows)} {key} to {options.output}", file=sys.stderr)
    if options.json:
        print_json({key: rows} if options.output is None else {"output": str(options.output), "rows": len(rows)})
    elif options.output is None:
        for line in lines:
            print(line)
