"""`compare`: finished runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import ConfigError


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("compare", help="finished runs side by side: a report with tests and pictures")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder for the report")
    parser.add_argument("--quality", type=float, metavar="Q", help="the score to time; default: what every run reaches")
    parser.add_argument("--price-per-hour", type=float, metavar="P", help="of the machine: adds what training cost")
    parser.add_argument("--currency", metavar="NAME", help="of that price, such as EUR")
    parser.add_argument("--data-dir", metavar="DIR", help="for the rows' texts; default: where the runs had them from")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Writes the report, and says who won."""
    if (options.price_per_hour is None) != (options.currency is None):
        raise ConfigError("--price-per-hour and --currency: expected both or neither, such as 1.20 and EUR")
    if options.price_per_hour is not None and not 0 <= options.price_per_hour < float("inf"):
        raise ConfigError(f"--price-per-hour: expected a number >= 0, found {options.price_per_hour:g}")
    from lora_hf.experiments.compare.comparison import CompareOptions, compare
    from lora_hf.experiments.compare.report import check_report_folder, write_report

    check_report_folder(options.output)
    asked = CompareOptions(options.quality, options.price_per_hour, options.currency, options.data_dir)
    record = compare(options.runs, asked)
    for each in record.left_out:
        print(f"left out {each['path']}: {each['reason']}", file=sys.stderr)
    written = write_report(record, options.output)
    if options.json:
        best = {task["task"]: _best(task) for task in record.tasks}
        files = {name: str(path) for name, path in written.items()}
        print_json({**files, "runs": len(record.runs), "left_out": record.left_out, "best": best})
        return
    for task in record.tasks:
        best = _best(task)
        print(f"{task['task']}, the best of {best['of']}: {task['metric']} {best['score']:.4f}  {best['label']}")
    for name, path in written.items():
        print(f"{name + ':':8}{path}")


def _best(task: dict[str, Any]) -> dict[str, Any]:
    """Of the configurations with the same data, and how many those are."""
    rows = [row for row in task["configurations"] if row["same_data"]]
    score = rows[0]["scores"][task["split"]][task["metric"]]["mean"]
    return {"label": rows[0]["label"], "score": score, "of": len(rows)}
