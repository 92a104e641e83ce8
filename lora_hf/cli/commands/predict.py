"""`predict`: classify texts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import (
    add_json,
    add_model,
    add_precision,
    add_revision,
    parse_named_adapters,
    print_rows,
    progress,
)
from lora_hf.core.errors import ConfigError
from lora_hf.core.imports import heavy_imports

if TYPE_CHECKING:
    from lora_hf.data.tasks.base import Task

HELP = "classify texts"

Answered = tuple[dict[str, str], dict[str, Any]]  # the texts of a row, and the answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="[NAME=]DIR",
        help="outputs/<run>/adapter, or USER/NAME on the hub; repeat with names for a file whose column 'adapter' "
        "names the adapter of each row",
    )
    add_revision(parser)
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="one text; repeat for more")
    source.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help=".csv, .tsv, .jsonl, .json or .parquet with the task's columns, or .txt with one text per line",
    )
    parser.add_argument(
        "--text-pair", action="append", metavar="TEXT", help="the second text, for tasks that read two; one per --text"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file for the rows instead of standard output: all columns of --input, the label and the probability of "
        "each class, as .csv, .tsv, .jsonl, .json or .parquet",
    )
    add_precision(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    if options.output is not None:
        from lora_hf.data.tables import check_output

        check_output(options.output, options.input)
    adapters = _named_adapters(options.adapter)
    predict = _predict_one if len(adapters) == 1 else _predict_mixed
    answered = predict(options, adapters)
    if options.output is not None:
        _write(options, answered)
    lines = [{**texts, **answer} for texts, answer in answered]
    print_rows(options, "predictions", lines, (json.dumps(line, ensure_ascii=False) for line in lines))


def _named_adapters(arguments: list[str]) -> dict[str, str]:
    """Folders or hub ids by name; a single one needs no name."""
    if len(arguments) == 1 and (Path(arguments[0]).exists() or "=" not in arguments[0]):
        return {"": arguments[0]}
    return parse_named_adapters(arguments)


def _write(options: argparse.Namespace, answered: list[Answered]) -> None:
    """Writes the answers beside all columns of the input file, or beside the text of the command line."""
    from lora_hf.data.readers import TABLE_SUFFIXES
    from lora_hf.data.tables import add_columns, read_table, write_table

    texts = [texts for texts, _ in answered]
    file: Path | None = options.input
    rows: list[dict[str, Any]] = texts
    if file is not None and file.suffix.lower() in (*TABLE_SUFFIXES, ".txt"):
        table = read_table(file, [*texts[0]][-1])
        if len(table) == len(texts):  # else its rows are of another form, such as a paragraph with many questions
            rows = table
    table, renamed = add_columns(rows, [_flat(answer) for _, answer in answered])
    if renamed:
        kept, others = ", ".join(renamed), ", ".join(renamed.values())
        print(f"the input has columns called {kept}, which are kept; the predictions are in {others}", file=sys.stderr)
    write_table(options.output, table)


def _flat(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with one value a column."""
    probabilities = answer.get("probabilities", {})
    others = {key: value for key, value in answer.items() if key != "probabilities"}
    return others | {f"probability_{name}": value for name, value in probabilities.items()}


def _predict_one(options: argparse.Namespace, adapters: dict[str, str]) -> list[Answered]:
    (adapter,) = adapters.values()
    from lora_hf.adapters.resolve import find_saved_model

    saved = find_saved_model(adapter, options.revision, options.model)
    if saved.task.verb != "predict":
        raise ConfigError(f"{adapter} was trained for {saved.task.name}, which generates text; use generate instead")
    columns = saved.task.text_columns
    if options.input is not None:
        rows = saved.task.read_inputs(options.input)
    else:
        rows = _rows_of_texts(saved.task, options.text, options.text_pair)
    with heavy_imports():
        from lora_hf.inference.classify import Predictor

    answers = Predictor.load(saved, options.precision).predict(rows, progress=progress if options.input else iter)
    return [({column: rows[column][i] for column in columns}, answer) for i, answer in enumerate(answers)]


def _predict_mixed(options: argparse.Namespace, adapters: dict[str, str]) -> list[Answered]:
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.data.readers import read_texts_of_adapters

    if options.input is None:
        raise ConfigError("--text works with one adapter; for several, pass an --input file whose rows name theirs")
    saved = {name: find_saved_model(adapter, options.revision, options.model) for name, adapter in adapters.items()}
    for name, each in saved.items():
        if each.task.model_kind != "sequence-classification":
            raise ConfigError(
                f"--adapter {name}={adapters[name]}: {each.task.name} does not classify texts, and the rows of several "
                f"adapters are for classifiers only; run it alone with {each.task.verb} --adapter {adapters[name]}"
            )
    rows = read_texts_of_adapters(options.input, {name: each.task.text_columns for name, each in saved.items()})
    with heavy_imports():
        from lora_hf.inference.classify import MultiAdapterPredictor

    answers = MultiAdapterPredictor.load(saved, options.precision).predict(rows, progress=progress)
    return [({"adapter": name, **row}, answer) for (name, row), answer in zip(rows, answers, strict=True)]


def _rows_of_texts(task: Task, texts: list[str], pairs: list[str] | None) -> dict[str, list]:
    columns = task.text_columns
    values = [texts] if pairs is None else [texts, pairs]
    if len(values) != len(columns):
        expected = "--text and --text-pair" if len(columns) == 2 else "--text alone"
        raise ConfigError(f"task {task.name} reads {' and '.join(columns)}: expected {expected}")
    if pairs is not None and len(pairs) != len(texts):
        raise ConfigError(f"--text-pair: expected one for each of {len(texts)} --text, found {len(pairs)}")
    for flag, given in zip(("--text", "--text-pair"), values, strict=False):
        if not all(value.strip() for value in given):
            raise ConfigError(f"{flag}: expected a text, found an empty one")
    return dict(zip(columns, values, strict=True))
