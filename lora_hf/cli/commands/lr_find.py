"""`lr-find`: find the learning rate of a config."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lora_hf.cli.terminal import add_json, print_json, require_packages

HELP = "find the learning rate of a config in a few minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a YAML file, or a recipe's name in configs/")
    add("--rates", metavar="RATE,...", help="learning rates to try; default: eight from 5e-5 to 1e-2")
    add("--steps", type=int, metavar="N", help="training steps of a rate that is not stopped early; default: 200")
    add("--pruner", choices=["halving", "none"], default="halving", help="none: train every rate to the end")
    add("--study", metavar="NAME", help="name of the study; default: CONFIG-lr; an existing study is continued")
    add("--output", metavar="DIR", help="parent of the study's folder; default: outputs")
    add_json(parser)
    add("overrides", nargs="*", metavar="key=value", help="such as lora.r=16 train.batch_size=8")


def run(options: argparse.Namespace) -> None:
    from lora_hf.experiments.sweep.lr_find import RATES, STEPS, advice, format_rate, lr_find, read_lr_find

    config, space = read_lr_find(
        options.config, options.overrides, options.rates.split(",") if options.rates else RATES
    )
    require_packages("lr-find", "sweep", ["optuna"])
    from lora_hf.experiments.sweep.plots import last_score

    config = replace(config, output=replace(config.output, dir=options.output or config.output.dir))
    name = options.study or f"{Path(options.config).stem}-lr"
    folder, record = lr_find(config, space, name, STEPS if options.steps is None else options.steps, options.pruner)
    trials = sorted(record.trials, key=lambda trial: trial["values"]["train.lr"])
    files = {"config": "best.yaml", "picture": "learning-rate.png", "losses": "losses.png", "record": "trials.json"}
    paths = {label: str(folder / file) for label, file in files.items()}
    line = advice(folder, record)
    if options.json:
        counts = Counter(trial["state"] for trial in trials)
        print_json({"study": name, "advice": line, "trials": counts, "best": record.best, **paths})
        return
    print(f"{'rate':8}{'trial':10}{'steps':>6}{record.metric:>24}{'loss':>9}")
    for trial in trials:
        score, loss = ("-" if value is None else f"{value:.4f}" for value in (last_score(trial), trial.get("loss")))
        steps = trial.get("steps", "-")
        print(f"{format_rate(trial['values']['train.lr']):8}{trial['state']:10}{steps:>6}{score:>24}{loss:>9}")
    print(f"\n{line}")
    for label, path in paths.items():
        print(f"{label + ':':9}{path}")
