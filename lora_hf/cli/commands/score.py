"""`score`: score generated texts like the official scorers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_hf.cli.terminal import add_json, format_score, print_json

HELP = "score a file of generated texts like the official scorers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="NAME", help="e2e_nlg, dart, web_nlg or rouge_bleu")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="a file with one text per line")
    parser.add_argument(
        "--references", required=True, type=Path, nargs="+", metavar="FILE", help="formats: docs/generation_metrics.md"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.data.metrics.requirements import ScorerError
    from lora_hf.data.metrics.texts import check_task, score_texts
    from lora_hf.data.reference_files import read_predictions, read_references

    check_task(options.task)
    references = read_references(options.references)
    predictions = read_predictions(options.predictions, references)
    scores = score_texts(options.task, predictions, references.groups, references.tokenized)
    if len(scores.reasons) == len(scores.values):
        reasons = "; ".join(dict.fromkeys(scores.reasons.values()))
        raise ScorerError(f"{options.task}: none of its scores can be computed: {reasons}")
    for name, reason in scores.reasons.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if options.json:
        print_json({"task": options.task, "scores": scores.values, "tools": scores.tools, "missing": scores.reasons})
        return
    for name, value in scores.values.items():
        print(f"{name:8}{format_score(value):>8}  {scores.tools[name]}")
