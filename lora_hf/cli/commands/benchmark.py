"""`benchmark glue` and `benchmark nlg`: every task of a family on one base, and one table of it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import TrainingError

if TYPE_CHECKING:
    from lora_hf.core.records import SuiteRecord

JOINT = 8  # runs: the tasks of GLUE
FAMILIES = {
    "glue": ("cola,sst2,mrpc,qqp,stsb,mnli,qnli,rte", "train and score all GLUE tasks, an adapter each on one base"),
    "nlg": ("e2e_nlg,dart,web_nlg", "train, write texts and score them, an adapter a task on one base"),
}


def add(verbs: Any) -> None:
    """Adds the verb, with one word for each family of tasks."""
    parser = verbs.add_parser("benchmark", help="train and score every task of GLUE, or of E2E, DART and WebNLG")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for family, (tasks, words) in FAMILIES.items():
        parser = kinds.add_parser(family, help=words, description=f"{words}. Finished runs are not run again.")
        parser.add_argument("--model", metavar="NAME", help="the base; default: that of the configs, or of the recipes")
        parser.add_argument("--data-dir", metavar="DIR", help="default: $LORA_HF_DATA_DIR, else the hub")
        parser.add_argument("--tasks", default=tasks, metavar="TASK,...", help=f"default: {tasks}")
        parser.add_argument("--seeds", default="0", metavar="N,...", help="of every task; TASK:seeds=0,1 for one")
        parser.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="a configuration for every task, may be given again; default: each task's published recipe",
        )
        parser.add_argument(
            "--from-mnli", action="store_true", help="LoRA runs of mrpc, rte and stsb start from the MNLI adapter"
        )
        parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: outputs/{family}")
        parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
        parser.add_argument(
            "--joint",
            type=int,
            nargs="?",
            const=JOINT,
            default=1,
            metavar="N",
            help=f"train N LoRA runs at a time together, on one copy of the base; without N: {JOINT}",
        )
        parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="[TASK:]key=value",
            help="all together: train.epochs=1, and of one task rte:train.epochs=10 mnli:seeds=0",
        )
        parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs what is missing, draws, and prints the tables of all that is finished."""
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
    record, file = run_suite(suite, options.jobs, options.joint)
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
        told = (f"{name}: {message}" for name, message in record.failures.items())
        raise TrainingError(
            "\n  ".join([f"{len(record.failures)} of {record.planned} runs failed; mend and call again:", *told])
        )


def _print_tables(record: SuiteRecord) -> None:
    from lora_hf.experiments.suite.tables import choice, resources, scores, storage, texts

    written = any("texts" in run for run in record.runs)
    for render in (scores, *((texts,) if written else ()), resources, storage, choice):
        print(f"{render(record)}\n")
