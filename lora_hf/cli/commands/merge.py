"""`merge`: an adapter and its base as one plain model."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_hf.cli.terminal import add_json, add_model, print_json
from lora_hf.core.imports import heavy_imports

HELP = "merge an adapter into its base and save a plain Hugging Face model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", required=True, type=Path, metavar="DIR", help="outputs/<run>/adapter")
    add_model(parser)
    add("--output", required=True, type=Path, metavar="DIR", help="model folder to write")
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="dtype of the weights; default: fp32")
    add("--overwrite", action="store_true", help="replace the output of an earlier merge")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.core.atomic_io import check_output_folder
    from lora_hf.core.records import MERGE_FILE

    saved = find_saved_model(options.adapter, model=options.model)
    check_output_folder(options.output, MERGE_FILE, options.overwrite)  # before importing torch takes seconds
    with heavy_imports():
        from lora_hf.adapters.merge import merge_adapter

    record = merge_adapter(saved, options.output, options.dtype, options.overwrite)
    if options.json:
        print_json({"output": str(options.output), "dtype": record.dtype, "drift": record.drift})
        return
    drift = record.drift
    limit = f"within the tolerance of {drift['tolerance']:g}"
    if "rounding" in drift:
        limit = f"which rounding the base explains ({drift['rounding']:.3g})"
    print(
        f"drift: {drift['relative']:.3g} of the largest logit, {limit} "
        f"({drift['max_abs']:.3g} of {drift['largest_logit']:.3g})"
    )
    print(f"model:  {options.output} ({record.dtype})\nrecord: {options.output / MERGE_FILE}")
