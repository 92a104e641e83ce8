"""`sweep`: find the values that score best."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import print_json, shown
from lora_hf.core.errors import ConfigError, how_to_install


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("sweep", help="find the values that score best, with Optuna")
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, or a recipe's name in configs/")
    parser.add_argument(
        "--trials", required=True, type=int, metavar="N", help="of the study, in all processes together"
    )
    parser.add_argument("--storage", metavar="URL", help="a database to share: sqlite:///sweep.db, postgresql://...")
    parser.add_argument("--study", metavar="NAME", help="default: that of the config; the same name goes on")
    parser.add_argument("--output", metavar="DIR", help="the folder of the study's folder; default: outputs")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampler")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="key=...",
        help="low..high, low..high:log, low..high:log2 (powers of two), a,b or 'a|b' (one of them), 2*other.key, value",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs the trials, and says which was best."""
    from lora_hf.data.tasks.registry import task_of
    from lora_hf.experiments.sweep.space import read_sweep

    config, space = read_sweep(options.config, options.overrides)
    if options.seed < 0:
        raise ConfigError(f"--seed: expected a whole number >= 0, found {options.seed}")
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"sweep needs Optuna: {how_to_install('sweep')}")
    from lora_hf.experiments.sweep.storage import check_study, parse_url

    name = options.study or Path(options.config).stem
    check_study(name, options.trials)
    if options.storage:
        parse_url(options.storage)
    task = task_of(config.task)
    # Mistakes in the data are told before the seconds that importing the Trainer takes.
    rows = task.load(config.task.data_dir, task.splits)
    from lora_hf.experiments.sweep.study import BEST, BEST_CONFIG, SWEEP_RECORD, states, sweep, typed

    config = replace(config, output=replace(config.output, dir=options.output or config.output.dir))
    folder, record = sweep(config, space, options.trials, name, options.storage, options.seed, rows)
    best, count = record.best, states(record)
    files = {"run": BEST, "config": BEST_CONFIG, "record": SWEEP_RECORD}
    places = {what: str(folder / file) for what, file in files.items()}
    if options.json:
        print_json({"study": name, "trials": count, "best": best, **places})
        return
    print(f"{record.split} {record.metric} {shown(best['score'])}: trial {best['number']}, {typed(best['values'])}")
    print("trials:  " + ", ".join(f"{number} {state}" for state, number in count.items()))
    for what, place in places.items():
        print(f"{what + ':':9}{place}")
