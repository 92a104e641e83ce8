"""`train`: fine-tune from a config, or from several configs together on one base."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import add_json, print_json
from lora_hf.core.errors import TrainingError

if TYPE_CHECKING:
    from lora_hf.core.config.schema import RunConfig
    from lora_hf.training.run import Run

HELP = "fine-tune a model from a config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="FILE",
        help="a YAML file, or a recipe's name in configs/; repeat to train several runs together on one base",
    )
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="continue from the last, or this, checkpoint")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as lora.r=16 train.epochs=1; docs/config.md lists all keys",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.core.config.loader import load_config
    from lora_hf.data.tasks.registry import task_of
    from lora_hf.training.distributed import destroy_processes, rank
    from lora_hf.training.run_dir import check_run_folder
    from lora_hf.training.validation import check_run, check_together

    configs = [load_config(file, options.overrides) for file in options.config]
    # Report every error that is known before reading the data and importing the Trainer take seconds.
    if len(configs) > 1:
        configs = _with_output_names(configs, options.config)
        check_together(configs, options.resume)
    for config in configs:
        check_run(config)
        check_run_folder(config, options.resume)
    rows = {}
    for config in configs:
        task = task_of(config.task)
        if task.name not in rows:
            rows[task.name] = task.load(config.task.data_dir, task.splits)
    if len(configs) > 1:
        _train_together(options, configs, rows)
        return
    from lora_hf.training.run import train

    run = train(configs[0], options.resume, rows[configs[0].task.name])
    destroy_processes()
    if rank():
        return
    if options.json:
        print_json(_summary(run))
    else:
        _print_summary(run)


def _with_output_names(configs: Sequence[RunConfig], files: Sequence[str]) -> list[RunConfig]:
    """The configs, those without an `output.name` named after their file."""
    from lora_hf.training.run_dir import time_stamp

    stamp = time_stamp()
    return [
        replace(config, output=replace(config.output, name=config.output.name or f"{Path(file).stem}-{stamp}"))
        for file, config in zip(files, configs, strict=True)
    ]


def _train_together(options: argparse.Namespace, configs: Sequence[RunConfig], rows: dict[str, Any]) -> None:
    from lora_hf.training.joint import train_together
    from lora_hf.training.run import Run

    outcomes = train_together(configs, rows)
    runs = [outcome for outcome in outcomes if isinstance(outcome, Run)]
    if options.json:
        print_json({"runs": [_summary(run) for run in runs]})
    else:
        for run in runs:
            print(f"{run.folder.name}:")
            _print_summary(run)
    failed = [
        f"{config.output.name}: {outcome}"
        for config, outcome in zip(configs, outcomes, strict=True)
        if not isinstance(outcome, Run)
    ]
    if failed:
        raise TrainingError("\n  ".join([f"{len(failed)} of {len(configs)} runs failed:", *failed]))


def _summary(run: Run) -> dict[str, Any]:
    record = run.record
    return {"run": str(run.folder), "weights": str(run.weights), "metrics": record.metrics, "best": record.best}


def _print_summary(run: Run) -> None:
    record = run.record
    for split, scores in record.metrics.items():
        print(f"{split}: " + "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    print(f"trained {record.parameters['trainable']:,} of {record.parameters['total']:,} parameters")
    print(f"weights: {run.weights}\nrecord:  {run.folder / 'record.json'}\ncurves:  {run.folder / 'curves.png'}")
