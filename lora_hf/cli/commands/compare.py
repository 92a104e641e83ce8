"""`compare`: a report of finished runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import add_json, print_json
from lora_hf.core.errors import ConfigError

HELP = "compare finished runs in a report with tests and plots"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of run folders")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the report")
    add("--quality", type=float, metavar="Q", help="compare the time to this score; default: one that all runs reach")
    add("--price-per-hour", type=float, metavar="P", help="price of the machine; adds the cost of training")
    add("--currency", metavar="NAME", help="currency of the price, such as EUR")
    add("--data-dir", metavar="DIR", help="folder with the texts of the rows; default: the one in the runs")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    if (options.price_per_hour is None) != (options.currency is None):
        raise ConfigError("--price-per-hour and --currency: expected both or neither, such as 1.20 and EUR")
    if options.price_per_hour is not None and not 0 <= options.price_per_hour < float("inf"):
        raise ConfigError(f"--price-per-hour: expected a number >= 0, found {options.price_per_hour:g}")
    from lora_hf.experiments.compare.comparison import CompareOptions, compare
    from lora_hf.experiments.compare.report import check_report_folder, write_report

    check_report_folder(options.output)
    settings = CompareOptions(options.quality, options.price_per_hour, options.currency, options.data_dir)
    record = compare(options.runs, settings)
    for skipped in record.left_out:
        print(f"left out {skipped['path']}: {skipped['reason']}", file=sys.stderr)
    files = {name: str(path) for name, path in write_report(record, options.output).items()}
    best = {task["task"]: _best(task) for task in record.tasks}
    if options.json:
        print_json({**files, "runs": len(record.runs), "left_out": record.left_out, "best": best})
        return
    for task in record.tasks:
        winner = best[task["task"]]
        label = f"{task['metric']} {winner['score']:.4f}  {winner['label']}"
        print(f"{task['task']}, the best of {winner['of']}: {label}")
    for name, path in files.items():
        print(f"{name + ':':8}{path}")


def _best(task: dict[str, Any]) -> dict[str, Any]:
    """The best configuration among those trained on the same data, and their number."""
    rows = [row for row in task["configurations"] if row["same_data"]]
    score = rows[0]["scores"][task["split"]][task["metric"]]["mean"]
    return {"label": rows[0]["label"], "score": score, "of": len(rows)}
