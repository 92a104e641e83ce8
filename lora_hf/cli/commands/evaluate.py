"""`eval`: score a trained run on a split."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import add_adapter, add_precision, print_json, progress, shown
from lora_hf.core.errors import ConfigError

if TYPE_CHECKING:
    from lora_hf.adapters.resolve import SavedModel


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("eval", help="score a trained run on a split")
    parser.add_argument("--split", help="default: every evaluation split of the task")
    parser.add_argument("--data-dir", metavar="DIR", help="default: $LORA_HF_DATA_DIR, else the hub")
    parser.add_argument("--without-adapter", action="store_true", help="the bare base, for comparison (generation)")
    add_precision(parser)
    add_adapter(parser)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Scores, by split and metric."""
    from lora_hf.adapters.resolve import find_saved_model

    saved = find_saved_model(options.adapter, options.revision)
    if options.without_adapter and saved.is_full_model:
        raise ConfigError(f"--without-adapter: {options.adapter} is a whole model, which has no base beside it")
    splits = saved.task.evaluation_splits if options.split in (None, "validation") else (options.split,)
    rows = saved.task.load(options.data_dir, splits)
    if saved.task.model_kind == "causal-lm":
        if options.precision:
            raise ConfigError(f"--precision: texts of {saved.task.name} are always written in fp32; leave it out")
        scores = _evaluate_texts(saved, rows, adapted=not options.without_adapter)
    elif options.without_adapter:
        raise ConfigError(
            f"--without-adapter: {saved.task.name} needs the trained head, which a bare base does not have"
        )
    else:
        from lora_hf.inference.classify import Predictor, evaluate

        scores = evaluate(Predictor.load(saved, options.precision), rows, progress)
    if options.json:
        print_json({"adapter": str(options.adapter), "metrics": scores})
        return
    for split, values in scores.items():
        print(f"{split}: " + "  ".join(f"{name} {shown(value)}" for name, value in values.items()))


def _evaluate_texts(saved: SavedModel, rows: Mapping[str, Any], adapted: bool) -> dict[str, Any]:
    """Scores by split and subset."""
    from lora_hf.inference.generate import Generator, evaluate_texts

    records, scores = evaluate_texts(Generator.load(saved, adapted), saved, rows, adapted, progress)
    here = Path.cwd()
    for record in records:
        print(f"record: {record.relative_to(here) if record.is_relative_to(here) else record}", file=sys.stderr)
    return {
        split if subset == "all" else f"{split}, {subset}": values
        for split, subsets in scores.items()
        for subset, values in subsets.items()
    }
