"""`demo`: fine-tune the embedded bases on embedded data."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lora_hf.cli.terminal import print_json


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("demo", help="fine-tune the embedded tiny bases on embedded data, in a few minutes")
    parser.add_argument("--output", default="outputs", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Trains, answers, and prints the table."""
    # Before the seconds that importing torch takes.
    print("three small trainings, one after the other: about two minutes on two cores", file=sys.stderr, flush=True)
    from lora_hf.cli.demo_report import demo

    report = demo(options.output)
    if options.json:
        print_json(report.to_dict())
    else:
        print(report.table())
