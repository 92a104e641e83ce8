"""`combine`: several adapters of one base as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_hf.cli.terminal import add_json, add_model, print_json
from lora_hf.core.errors import ConfigError
from lora_hf.core.imports import heavy_imports

HELP = "combine several adapters of one base into one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", required=True, action="append", metavar="DIR=WEIGHT", help="such as outputs/a/adapter=0.7; repeat")
    add_model(parser)
    add("--method", default="linear", choices=["linear", "svd", "ties", "dare"], help="default: linear, the exact sum")
    add("--rank", type=int, metavar="R", help="rank of the new adapter; default: the largest of the inputs")
    add("--density", type=float, metavar="D", help="share of entries that ties and dare keep")
    add("--seed", type=int, default=0, metavar="N", help="random seed of dare")
    add("--output", required=True, type=Path, metavar="DIR", help="adapter folder to write")
    add("--overwrite", action="store_true", help="replace the output of an earlier combine")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.core.atomic_io import check_output_folder
    from lora_hf.core.records import COMBINE_FILE

    adapters = [_weighted_adapter(argument) for argument in options.adapter]
    # Before importing torch takes seconds.
    check_output_folder(options.output, COMBINE_FILE, options.overwrite)
    with heavy_imports():
        from lora_hf.adapters.combine import combine_saved

    record = combine_saved(
        adapters,
        options.output,
        options.method,
        options.rank,
        options.density,
        options.seed,
        options.overwrite,
        options.model,
    )
    if options.json:
        result = {"ranks": record.ranks, "errors": record.errors, "error": record.error}
        print_json({"output": str(options.output), **result})
        return
    low, high = min(record.ranks.values(), default=0), max(record.ranks.values(), default=0)
    print(f"combined {len(adapters)} adapters by {record.method}: rank {low if low == high else f'{low} to {high}'}")
    if record.method != "linear":
        worst = max(record.errors, key=lambda path: record.errors[path], default="")
        most = f"{record.errors[worst]:.2%}, in {worst}"
        print(f"lost by truncating to the rank: {record.error:.2%} overall, at most {most}")
    print(f"adapter: {options.output}\nrecord:  {options.output / COMBINE_FILE}")


def _weighted_adapter(argument: str) -> tuple[Path, float]:
    folder, _, weight = argument.rpartition("=")
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ConfigError(f"--adapter {argument}: expected DIR=WEIGHT, such as outputs/a/adapter=0.7") from None
