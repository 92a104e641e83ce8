"""`predict`: classify texts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import add_precision, named_adapters, print_json, progress, write_lines
from lora_hf.core.errors import ConfigError

if TYPE_CHECKING:
    from lora_hf.data.tasks.base import Task


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("predict", help="classify texts")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text")
    source.add_argument("--input", type=Path, metavar="FILE", help="a text a line, or .jsonl with the task's columns")
    parser.add_argument("--text-pair", help="the second text, where the task reads two")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write .jsonl there instead of standard output")
    add_precision(parser)
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="[NAME=]DIR",
        help="outputs/<run>/adapter, or USER/NAME on the hub; several, each with a name, answer the rows that name it "
        "under 'adapter'",
    )
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of USER/NAME")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """A JSON object for each text."""
    adapters = _named(options.adapter)
    lines = _alone(options, *adapters.values()) if len(adapters) == 1 else _mixed(options, adapters)
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


def _named(words: list[str]) -> dict[str, str]:
    """Folders or hub ids by name; one alone needs none."""
    if len(words) == 1 and (Path(words[0]).exists() or "=" not in words[0]):
        return {"": words[0]}
    return named_adapters(words)


def _alone(options: argparse.Namespace, adapter: str) -> list[dict[str, Any]]:
    from lora_hf.adapters.resolve import find_saved_model

    saved = find_saved_model(adapter, options.revision)
    if saved.task.model_kind != "sequence-classification":
        raise ConfigError(f"{adapter} was trained for {saved.task.name}, which writes texts; use generate instead")
    columns = saved.task.text_columns
    if options.input is not None:
        from lora_hf.data.input_files import read_rows

        rows = read_rows(options.input, columns)
    else:
        rows = _texts(saved.task, options.text, options.text_pair)
    from lora_hf.inference.classify import Predictor

    answers = Predictor.load(saved, options.precision).predict(rows, progress=progress if options.input else iter)
    return [{**{column: rows[column][i] for column in columns}, **answer} for i, answer in enumerate(answers)]


def _mixed(options: argparse.Namespace, adapters: dict[str, str]) -> list[dict[str, Any]]:
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.data.input_files import read_mixed_rows

    if options.input is None:
        raise ConfigError("--text goes to one adapter; give several an --input file whose rows name theirs")
    saved = {name: find_saved_model(adapter, options.revision) for name, adapter in adapters.items()}
    rows = read_mixed_rows(options.input, {name: each.task.text_columns for name, each in saved.items()})
    from lora_hf.inference.classify import MultiAdapterPredictor

    answers = MultiAdapterPredictor.load(saved, options.precision).predict(rows, progress=progress)
    return [{"adapter": name, **row, **answer} for (name, row), answer in zip(rows, answers, strict=True)]


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
