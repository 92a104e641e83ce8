"""`train`: fine-tune as a config says, or as several say, together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import TrainingError

if TYPE_CHECKING:
    from lora_hf.core.config.schema import RunConfig
    from lora_hf.training.run import Run


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("train", help="fine-tune as a config says")
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="FILE",
        help="a YAML file, or a recipe's name in configs/; given again, all train together on one base",
    )
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on from a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as lora.r=16 train.epochs=1")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Trains, and says what came out."""
    from lora_hf.core.config.loader import load_config
    from lora_hf.data.tasks.registry import task_of
    from lora_hf.training.distributed import destroy_processes, rank
    from lora_hf.training.run_dir import check_run_folder
    from lora_hf.training.validation import check_run, check_together

    configs = [load_config(file, options.overrides) for file in options.config]
    # Mistakes are told before the seconds that reading the data and importing the Trainer take.
    if len(configs) > 1:
        configs = _named(configs, options.config)
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
        _together(options, configs, rows)
        return
    from lora_hf.training.run import train

    run = train(configs[0], options.resume, rows[configs[0].task.name])
    destroy_processes()
    if rank():
        return
    if options.json:
        print_json(_told(run))
    else:
        _print(run)


def _named(configs: Sequence[RunConfig], files: Sequence[str]) -> list[RunConfig]:
    """Each with a folder of its own, named after its file where it has no name."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return [
        replace(config, output=replace(config.output, name=config.output.name or f"{Path(file).stem}-{stamp}"))
        for file, config in zip(files, configs, strict=True)
    ]


def _together(options: argparse.Namespace, configs: Sequence[RunConfig], rows: dict[str, Any]) -> None:
    from lora_hf.training.joint import train_together
    from lora_hf.training.run import Run

    outcomes = train_together(configs, options.resume, rows)
    runs = [outcome for outcome in outcomes if isinstance(outcome, Run)]
    if options.json:
        print_json({"runs": [_told(run) for run in runs]})
    else:
        for run in runs:
            print(f"{run.folder.name}:")
            _print(run)
    failed = [
        f"{config.output.name}: {outcome}"
        for config, outcome in zip(configs, outcomes, strict=True)
        if not isinstance(outcome, Run)
    ]
    if failed:
        raise TrainingError("\n  ".join([f"{len(failed)} of {len(configs)} runs stopped:", *failed]))


def _told(run: Run) -> dict[str, Any]:
    record = run.record
    return {"run": str(run.folder), "weights": str(run.weights), "metrics": record.metrics, "best": record.best}


def _print(run: Run) -> None:
    record = run.record
    for split, scores in record.metrics.items():
        print(f"{split}: " + "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    print(f"trained {record.parameters['trainable']:,} of {record.parameters['total']:,} parameters")
    print(f"weights: {run.weights}\nrecord:  {run.folder / 'record.json'}\ncurves:  {run.folder / 'curves.png'}")
