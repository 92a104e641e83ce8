"""`train`: fine-tune from a config."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_hf.cli.commands.plan import show_plan
from lora_hf.cli.terminal import add_json, print_json
from lora_hf.core.imports import heavy_imports

if TYPE_CHECKING:
    from lora_hf.training.run import Run

HELP = "fine-tune a model from a config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, or a recipe's name in configs/")
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="continue from the newest checkpoint or this one")
    parser.add_argument(
        "--max-train-rows", type=int, metavar="N", help="train on N rows only; the same as task.train_rows=N"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as lora.r=16 train.epochs=1; docs/config.md lists all keys",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what the run will do and cost, as plan does")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.core.config.loader import load_config
    from lora_hf.data.tasks.label_names import infer_label_names
    from lora_hf.data.tasks.registry import task_of
    from lora_hf.training.distributed import destroy_processes, rank
    from lora_hf.training.run_dir import check_run_folder
    from lora_hf.training.validation import check_run

    limit = [] if options.max_train_rows is None else [f"task.train_rows={options.max_train_rows}"]
    config = load_config(options.config, [*options.overrides, *limit])
    # Report every error that is known before reading the data and importing the Trainer take seconds.
    check_run(config)
    config = replace(config, task=infer_label_names(config.task))
    if options.dry_run:
        show_plan(config, options.json)
        return
    check_run_folder(config, options.resume)
    task = task_of(config.task)
    with heavy_imports():
        rows = task.load(config.task.data_dir, task.splits)  # with `datasets`, which imports torch
        from lora_hf.training.run import train

    run = train(config, options.resume, rows)
    destroy_processes()
    if rank():
        return
    if options.json:
        where = {"run": str(run.folder), "weights": str(run.weights)}
        print_json({**where, "metrics": run.record.metrics, "best": run.record.best})
    else:
        _print_summary(run)


def _print_summary(run: Run) -> None:
    from lora_hf.training.run_dir import pictures_in

    record = run.record
    for split, scores in record.metrics.items():
        print(f"{split}: " + "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    print(f"trained {record.parameters['trainable']:,} of {record.parameters['total']:,} parameters")
    print(f"weights: {run.weights}\nrecord:  {run.folder / 'record.json'}")
    for picture in pictures_in(run.folder):
        print(f"picture: {picture}")
