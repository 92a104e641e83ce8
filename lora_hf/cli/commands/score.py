"""`score`: score a file of texts as the official scorer does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import print_json, shown


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("score", help="score a file of texts as the official scorer does")
    parser.add_argument("--task", required=True, metavar="NAME", help="e2e_nlg, dart or web_nlg")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="a text a line")
    parser.add_argument(
        "--references", required=True, type=Path, nargs="+", metavar="FILE", help="see docs/generation_metrics.md"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """The scores, with the tool that computed each."""
    from lora_hf.data.metrics.texts import check_task, score_texts
    from lora_hf.data.reference_files import read_predictions, read_references

    check_task(options.task)
    references = read_references(options.references)
    predictions = read_predictions(options.predictions, references)
    scores = score_texts(options.task, predictions, references.groups, references.tokenized)
    for name, reason in scores.reasons.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if options.json:
        print_json({"task": options.task, "scores": scores.values, "tools": scores.tools, "missing": scores.reasons})
        return
    for name, value in scores.values.items():
        print(f"{name:8}{shown(value):>8}  {scores.tools[name]}")
