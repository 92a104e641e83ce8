"""`combine`: several adapters of one base as one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import ConfigError


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("combine", help="make one adapter of several")
    parser.add_argument(
        "--adapter", required=True, action="append", metavar="DIR=WEIGHT", help="such as outputs/a/adapter=0.7; repeat"
    )
    parser.add_argument(
        "--method", default="linear", choices=["linear", "svd", "ties", "dare"], help="linear is the exact sum"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="of the new adapter; default: the largest there is")
    parser.add_argument("--density", type=float, metavar="D", help="the share of entries that ties and dare keep")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of dare")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the adapter folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier combination")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Combines, and says what the rank leaves out."""
    from lora_hf.core.atomic_io import check_output_folder
    from lora_hf.core.records import COMBINE_FILE

    adapters = [_weighted(words) for words in options.adapter]
    check_output_folder(
        options.output, COMBINE_FILE, options.overwrite
    )  # before the seconds that importing torch takes
    from lora_hf.adapters.combine import combine_saved

    record = combine_saved(
        adapters,
        options.output,
        options.method,
        options.rank,
        options.density,
        options.seed,
        options.overwrite,
    )
    if options.json:
        print_json(
            {"output": str(options.output), "ranks": record.ranks, "errors": record.errors, "error": record.error}
        )
        return
    low, high = min(record.ranks.values(), default=0), max(record.ranks.values(), default=0)
    print(f"{record.method} of {len(adapters)} adapters: rank {low if low == high else f'{low} to {high}'}")
    if record.method != "linear":
        worst = max(record.errors, key=lambda path: record.errors[path], default="")
        print(f"left out by the rank: {record.error:.2%} of all; the most, {record.errors[worst]:.2%}, of {worst}")
    print(f"adapter: {options.output}\nrecord:  {options.output / COMBINE_FILE}")


def _weighted(words: str) -> tuple[Path, float]:
    folder, _, weight = words.rpartition("=")
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ConfigError(f"--adapter {words}: expected DIR=WEIGHT, such as outputs/a/adapter=0.7") from None
