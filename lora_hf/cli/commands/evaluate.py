"""`eval`: score an adapter on a split of its task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.evaluation_text import describe_evaluation
from lora_hf.cli.terminal import (
    add_adapter,
    add_data_dir,
    add_exact,
    add_json,
    add_precision,
    check_exact,
    format_score,
    print_json,
    progress,
)
from lora_hf.core.errors import ConfigError
from lora_hf.core.imports import heavy_imports

if TYPE_CHECKING:
    from lora_hf.adapters.resolve import SavedModel

HELP = "score a trained run on a split of its task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("--split", help="split to score; default: every evaluation split of the task")
    add_data_dir(parser, "the run")
    parser.add_argument("--without-adapter", action="store_true", help="score the bare base instead (generation only)")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="folder for plots of a classifier: confusion matrix and reliability"
    )
    add_precision(parser)
    add_exact(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.adapters.resolve import find_saved_model

    check_exact(options)
    saved = find_saved_model(options.adapter, options.revision, options.model)
    if options.without_adapter and saved.is_full_model:
        raise ConfigError(f"--without-adapter: {options.adapter} is a whole model and has no adapter to leave out")
    splits = saved.task.evaluation_splits if options.split in (None, "validation") else (options.split,)
    with heavy_imports():
        rows = saved.task.load(_data_dir(options, saved), splits)  # with `datasets`, which imports torch
    evaluation: dict[str, dict[str, Any]] = {}
    if saved.task.verb == "generate":
        if options.precision == "int8":
            raise ConfigError(
                f"--precision int8: {saved.task.name} generates texts; train with model.quantised=int8, or leave it out"
            )
        scores = _evaluate_texts(saved, rows, options)
    elif options.without_adapter:
        raise ConfigError(f"--without-adapter: {saved.task.name} needs a trained head, which the bare base lacks")
    else:
        with heavy_imports():
            from lora_hf.inference.classify import Predictor, evaluate

        found = evaluate(Predictor.load(saved, options.precision, options.exact), rows, progress)
        scores = {split: metrics for split, (metrics, _) in found.items()}
        evaluation = {split: more for split, (_, more) in found.items() if more}
    if options.plots is not None:
        _draw(evaluation, saved.task.name, options.plots)
    if options.json:
        more = {"evaluation": evaluation} if evaluation else {}
        print_json({"adapter": str(options.adapter), "metrics": scores, **more})
        return
    for split, values in scores.items():
        print(f"{split}: " + "  ".join(f"{name} {format_score(value)}" for name, value in values.items()))
        for line in describe_evaluation(evaluation.get(split, {})):
            print(line)


def _data_dir(options: argparse.Namespace, saved: SavedModel) -> str | None:
    """The folder of the rows; None for the one of the environment, or the hub."""
    folder = saved.data_dir
    if options.data_dir is not None or folder is None or Path(folder).expanduser().is_dir():
        return options.data_dir or folder
    print(f"task.data_dir={folder} of the run does not exist here; --data-dir names another", file=sys.stderr)
    return None


def _draw(evaluation: Mapping[str, dict[str, Any]], task: str, folder: Path) -> None:
    from lora_hf.training.evaluation_plots import draw_evaluation

    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [
            path
            for split, each in evaluation.items()
            for path in draw_evaluation(each, f"{task}, {split}", folder, split)
        ]
    except OSError as error:
        raise ConfigError(f"--plots {folder}: cannot be written: {error.strerror}") from error
    for path in drawn:
        print(f"wrote {path}", file=sys.stderr)


def _evaluate_texts(saved: SavedModel, rows: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The scores by split and subset."""
    with heavy_imports():
        from lora_hf.inference.generate import Generator, evaluate_texts

    adapted = not options.without_adapter
    generator = Generator.load(saved, adapted, options.precision, options.exact)
    records, scores = evaluate_texts(generator, saved, rows, adapted, progress)
    cwd = Path.cwd()
    for record in records:
        print(f"record: {record.relative_to(cwd) if record.is_relative_to(cwd) else record}", file=sys.stderr)
    return {
        split if subset == "all" else f"{split}, {subset}": values
        for split, subsets in scores.items()
        for subset, values in subsets.items()
    }
