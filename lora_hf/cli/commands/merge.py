"""`merge`: an adapter and its base as one plain model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import print_json


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("merge", help="write an adapter and its base as one plain Hugging Face model")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="outputs/<run>/adapter")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the written weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier merge")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Merges, and says how far the answers moved."""
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.core.atomic_io import check_output_folder
    from lora_hf.core.records import MERGE_FILE

    saved = find_saved_model(options.adapter)
    check_output_folder(options.output, MERGE_FILE, options.overwrite)  # before the seconds that importing torch takes
    from lora_hf.adapters.merge import merge_adapter

    record = merge_adapter(saved, options.output, options.dtype, options.overwrite)
    if options.json:
        print_json({"output": str(options.output), "dtype": record.dtype, "drift": record.drift})
        return
    drift = record.drift
    print(
        f"drift: a logit moved by at most {drift['max_abs']:.3g}, the largest being {drift['largest_logit']:.3g}: "
        f"relative {drift['relative']:.3g}, allowed {drift['tolerance']:g}: fine"
    )
    print(f"model:  {options.output} ({record.dtype})\nrecord: {options.output / MERGE_FILE}")
