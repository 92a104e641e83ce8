"""`plan`: what a run will do and cost."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from lora_hf.cli.terminal import add_json, print_json
from lora_hf.core.imports import heavy_imports

if TYPE_CHECKING:
    from lora_hf.core.config.schema import RunConfig
    from lora_hf.data.overview import DataOverview
    from lora_hf.training.plan import RunPlan

HELP = "show what a run will do and cost, without running it"
TRAINED, PLAIN = "\033[32m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, or a recipe's name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as lora.r=16 train.epochs=1")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.core.config.loader import load_config

    show_plan(load_config(options.config, options.overrides), options.json)


def show_plan(config: RunConfig, as_json: bool) -> None:
    """Prints the plan of a run: the rows, two of them as the model reads them, the modules, memory, time and files."""
    with heavy_imports():
        from lora_hf.training.plan import plan_run

    plan = plan_run(config)
    if as_json:
        print_json(asdict(plan) | {"folder": str(plan.folder)})
        return
    print("\n\n".join(["\n".join(plan.data.lines()), _examples(plan.data), _modules(plan), _costs(plan)]))


def _examples(data: DataOverview) -> str:
    colored = sys.stdout.isatty()
    start, end = (TRAINED, PLAIN) if colored else (">>", "<<")
    parts = []
    for number, example in enumerate(data.examples):
        text = "".join(f"{start}{piece}{end}" if trained else piece for piece, trained in example)
        parts.append(f"row {number}: {text}")
    if any(trained for example in data.examples for _, trained in example):
        parts.append(f"(the loss is on the parts {'in green' if colored else 'between >> and <<'})")
    return "\n".join(parts)


def _modules(plan: RunPlan) -> str:
    counts = plan.parameters
    lines = [f"adapts {role}: {len(paths)} modules, {paths[0]} to {paths[-1]}" for role, paths in plan.modules.items()]
    parts = f"{counts['lora']:,} of LoRA, {counts['head']:,} of heads and modules to save"
    return "\n".join([*lines, f"trains {counts['trainable']:,} of {counts['total']:,} parameters: {parts}"])


def _costs(plan: RunPlan) -> str:
    files = ", ".join(plan.files)
    return f"{plan.steps:,} steps; {plan.estimate.line()}\nwrites {plan.folder}: {files}"
