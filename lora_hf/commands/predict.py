"""`predict`: classify texts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.commands.adapter import add_adapter
from lora_hf.commands.output import print_json, progress, write_lines
from lora_hf.errors import ConfigError

if TYPE_CHECKING:
    from lora_hf.tasks.base import Task


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("predict", help="classify texts")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text")
    source.add_argument("--input", type=Path, metavar="FILE", help="a text a line, or .jsonl with the task's columns")
    parser.add_argument("--text-pair", help="the second text, where the task reads two")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write .jsonl there instead of standard output")
    add_adapter(parser)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """A JSON object for each text."""
    from lora_hf.saved import find_saved

    saved = find_saved(options.adapter, options.revision)
    if saved.task.model_kind != "sequence-classification":
        raise ConfigError(
            f"{options.adapter} was trained for {saved.task.name}, which writes texts; use generate instead"
        )
    columns = saved.task.text_columns
    if options.input is not None:
        from lora_hf.rows import read_rows

        rows = read_rows(options.input, columns)
    else:
        rows = _texts(saved.task, options.text, options.text_pair)
    from lora_hf.inference import Predictor

    answers = Predictor.load(saved).predict(rows, progress=progress if options.input else iter)
    lines = [{**{column: rows[column][i] for column in columns}, **answer} for i, answer in enumerate(answers)]
    if options.output is not None:
        write_lines(options.output, lines)
        print(f"{len(lines)} predictions in {options.output}", file=sys.stderr)
    if options.json:
        print_json(
            {"predictions": lines} if options.output is None else {"output": str(options.output), "rows": len(lines)}
        )
    elif options.output is None:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))


def _texts(task: Task, text: str, pair: str | None) -> dict[str, list]:
    columns = task.text_columns
    given = [text] if pair is None else [text, pair]
    if len(given) != len(columns):
        wanted = "--text and --text-pair" if len(columns) == 2 else "--text alone"
        raise ConfigError(f"task {task.name} reads {' and '.join(columns)}: expected {wanted}")
    for value in given:
        if not value.strip():
            raise ConfigError("--text: expected a text, found nothing")
    return {column: [value] for column, value in zip(columns, given, strict=True)}
