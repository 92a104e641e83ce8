"""`benchmark glue` and `benchmark nlg`: all tasks of a family on one base, in one table."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hf.cli.terminal import add_data_dir, add_json, print_json
from lora_hf.core.errors import TrainingError

if TYPE_CHECKING:
    from lora_hf.core.records import SuiteRecord

HELP = "train and score every task of GLUE, or of E2E, DART and WebNLG"
FAMILIES = {
    "glue": ("cola,sst2,mrpc,qqp,stsb,mnli,qnli,rte", "train and score one adapter for each GLUE task on one base"),
    "nlg": ("e2e_nlg,dart,web_nlg", "train one adapter for each generation task on one base, and score its texts"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = parser.add_subparsers(dest="what", required=True, metavar="FAMILY")
    for family, (tasks, words) in FAMILIES.items():
        description = f"{words[0].upper()}{words[1:]}. Finished runs are kept and not run again."
        parser = families.add_parser(family, help=words, description=description)
        add = parser.add_argument
        add("--model", metavar="NAME", help="base model; default: the one in the configs or recipes")
        add_data_dir(parser, "the configs")
        add("--tasks", default=tasks, metavar="TASK,...", help=f"default: {tasks}")
        add("--seeds", default="0", metavar="N,...", help="seeds for every task; TASK:seeds=0,1 overrides one task")
        add(
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="a config to run on every task; repeat for several; default: each task's published recipe",
        )
        add("--from-mnli", action="store_true", help="start the LoRA runs of mrpc, rte and stsb from the MNLI adapter")
        add("--output", type=Path, metavar="DIR", help=f"default: outputs/{family}")
        add("--jobs", type=int, default=1, metavar="N", help="parallel runs, which share the cores")
        add_json(parser)
        add(
            "overrides",
            nargs="*",
            metavar="[TASK:][CONFIG:]key=value",
            help="for all runs, such as train.epochs=1; for those of a task, such as rte:train.epochs=10, of a config, "
            "or of both, such as rte:my_config:train.lr=1e-3",
        )


def run(options: argparse.Namespace) -> None:
    from lora_hf.experiments.suite.plan import SuiteOptions, parse_seeds
    from lora_hf.experiments.suite.run import run_suite

    suite = SuiteOptions(
        tasks=tuple(options.tasks.split(",")),
        output=options.output or Path("outputs") / options.what,
        model=options.model,
        data_dir=options.data_dir,
        seeds=parse_seeds(options.seeds, f"--seeds {options.seeds}"),
        configs=tuple(options.config),
        from_mnli=options.from_mnli,
        overrides=tuple(options.overrides),
    )
    record, file = run_suite(suite, options.jobs)
    plots = []
    if record.runs:
        from lora_hf.experiments.suite.plots import draw_suite

        plots = draw_suite(record, file.parent)
    if options.json:
        print_json({"record": str(file), "plots": list(map(str, plots)), **asdict(record)})
    elif record.runs:
        _print_tables(record)
        print("\n".join([f"record: {file}", *(f"plot:   {plot}" for plot in plots)]))
    if record.failures:
        failures = (f"{name}: {message}" for name, message in record.failures.items())
        title = f"{len(record.failures)} of {record.planned} runs failed; fix the cause and run the same command again:"
        raise TrainingError("\n  ".join([title, *failures]))


def _print_tables(record: SuiteRecord) -> None:
    from lora_hf.experiments.suite.tables import choice, resources, scores, storage, texts

    has_texts = any("texts" in run for run in record.runs)
    for render in (scores, *((texts,) if has_texts else ()), resources, storage, choice):
        print(f"{render(record)}\n")
