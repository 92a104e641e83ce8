"""`sweep`: search for the best hyperparameters."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lora_hf.cli.terminal import add_json, format_score, print_json, require_packages
from lora_hf.core.errors import ConfigError

HELP = "search for the best hyperparameters with Optuna"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a YAML file, or a recipe's name in configs/")
    add("--trials", type=int, metavar="N", help="trials of the study, over all processes; default for a grid: all")
    add("--sampler", default="tpe", metavar="NAME", help="tpe (default), or grid: every combination of the values")
    add("--storage", metavar="URL", help="a database that processes share: sqlite:///sweep.db, postgresql://...")
    add("--study", metavar="NAME", help="name of the study; default: the config's; an existing study is continued")
    add("--output", metavar="DIR", help="parent of the study's folder; default: outputs")
    add("--pruner", default="halving", metavar="NAME", help="halving (default), hyperband, median or none")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the sampler; default: 0")
    add_json(parser)
    add(
        "overrides",
        nargs="+",
        metavar="key=...",
        help="low..high, low..high:log, low..high:log2 (powers of two), a,b or 'a|b' (one of them), 2*other.key, value",
    )


def run(options: argparse.Namespace) -> None:
    from lora_hf.experiments.sweep.space import read_sweep

    config, space = read_sweep(options.config, options.overrides)
    if options.seed < 0:
        raise ConfigError(f"--seed: expected a whole number >= 0, found {options.seed}")
    require_packages("sweep", "sweep", ["optuna"])
    from lora_hf.experiments.sweep.study import BEST, BEST_CONFIG, SWEEP_RECORD, SweepSettings, sweep, typed

    name = options.study or Path(options.config).stem
    config = replace(config, output=replace(config.output, dir=options.output or config.output.dir))
    settings = SweepSettings(config, space, name, options.trials, options.seed, options.pruner, options.sampler)
    folder, record = sweep(settings, options.storage)
    best, count = record.best, Counter(trial["state"] for trial in record.trials)
    files = {"run": BEST, "config": BEST_CONFIG, "record": SWEEP_RECORD}
    paths = {label: str(folder / file) for label, file in files.items()}
    if options.json:
        print_json({"study": name, "trials": count, "best": best, **paths})
        return
    score = f"{record.split} {record.metric} {format_score(best['score'])}"
    print(f"best:    {score} in trial {best['number']}, {typed(best['values'])}")
    print("trials:  " + ", ".join(f"{number} {state}" for state, number in count.items()))
    for label, path in paths.items():
        print(f"{label + ':':9}{path}")
