"""`train`: fine-tune as a config says."""

from __future__ import annotations

import argparse
from typing import Any

from lora_hf.commands.output import print_json


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("train", help="fine-tune as a config says")
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, or a recipe's name in configs/")
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on from a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as lora.r=16 train.epochs=1")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Trains, and says what came out."""
    from lora_hf.config import load_config
    from lora_hf.tasks.table import get_task

    config = load_config(options.config, options.overrides)
    task = get_task(config.task.name)
    # Mistakes in the data are told before the seconds that importing the Trainer takes.
    rows = task.load(config.task.data_dir, task.splits)
    from lora_hf.training import train

    run = train(config, options.resume, rows)
    record = run.record
    if options.json:
        print_json(
            {"run": str(run.folder), "weights": str(run.weights), "metrics": record.metrics, "best": record.best}
        )
        return
    for split, scores in record.metrics.items():
        print(f"{split}: " + "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    print(f"trained {record.parameters['trainable']:,} of {record.parameters['total']:,} parameters")
    print(f"weights: {run.weights}\nrecord:  {run.folder / 'record.json'}\ncurves:  {run.folder / 'curves.png'}")
