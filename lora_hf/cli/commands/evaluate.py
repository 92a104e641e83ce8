"""`eval`: score an adapter on a split of its task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import add_adapter, add_data_dir, add_json, add_precision, format_score, print_json, progress
from lora_hf.core.errors import ConfigError

if TYPE_CHECKING:
    from lora_hf.adapters.resolve import SavedModel

HELP = "score a trained run on a split of its task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("--split", help="default: every evaluation split of the task")
    add_data_dir(parser)
    parser.add_argument("--without-adapter", action="store_true", help="score the bare base instead (generation only)")
    add_precision(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.adapters.resolve import find_saved_model

    saved = find_saved_model(options.adapter, options.revision, options.model)
    if options.without_adapter and saved.is_full_model:
        raise ConfigError(f"--without-adapter: {options.adapter} is a whole model and has no adapter to leave out")
    splits = saved.task.evaluation_splits if options.split in (None, "validation") else (options.split,)
    rows = saved.task.load(options.data_dir, splits)
    if saved.task.verb == "generate":
        if options.precision:
            raise ConfigError(f"--precision: {saved.task.name} is always generated in fp32; leave the option out")
        scores = _evaluate_texts(saved, rows, adapted=not options.without_adapter)
    elif options.without_adapter:
        raise ConfigError(f"--without-adapter: {saved.task.name} needs a trained head, which the bare base lacks")
    else:
        from lora_hf.inference.classify import Predictor, evaluate

        scores = evaluate(Predictor.load(saved, options.precision), rows, progress)
    if options.json:
        print_json({"adapter": str(options.adapter), "metrics": scores})
        return
    for split, values in scores.items():
        print(f"{split}: " + "  ".join(f"{name} {format_score(value)}" for name, value in values.items()))


def _evaluate_texts(saved: SavedModel, rows: Mapping[str, Any], adapted: bool) -> dict[str, Any]:
    """The scores by split and subset."""
    from lora_hf.inference.generate import Generator, evaluate_texts

    records, scores = evaluate_texts(Generator.load(saved, adapted), saved, rows, adapted, progress)
    cwd = Path.cwd()
    for record in records:
        print(f"record: {record.relative_to(cwd) if record.is_relative_to(cwd) else record}", file=sys.stderr)
    return {
        split if subset == "all" else f"{split}, {subset}": values
        for split, subsets in scores.items()
        for subset, values in subsets.items()
    }
