"""How the frozen base is held, and what that costs: `python -m tools.benchmark.quantised`.

fp32, bf16, int8 and nf4 bases, twice. SST-2 on tiny-roberta is trained and scored, then scored again merged, where the
base is quantised, and with int8 products. The shape of roberta-base, with random weights, gives the speed and memory of
training steps, a process a form, taking turns.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.cli.terminal import check_record, write_record
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.lora.inject import merge, merge_drift
from lora_hf.training.run import train
from tools.benchmark.process import SideProcess
from tools.benchmark.train import summary, take_turns, work_rows
from tools.benchmark.work import OURS, Work

logger = logging.getLogger(__name__)

# What a packed base computes in is what makes it comparable: fp32 here as there, and bf16 as QLoRA does.
FORMS: dict[str, dict[str, str]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "fp32", "quantised": "int8"},
    "int8-bf16": {"precision": "bf16", "quantised": "int8"},
    "nf4": {"precision": "fp32", "quantised": "nf4"},
    "nf4-bf16": {"precision": "bf16", "quantised": "nf4"},
}
PREDICTED = ("fp32", "bf16", "int8")  # what the adapter of the fp32 run answers in


def measure(
    data_dir: str | None,
    forms: Sequence[str] = tuple(FORMS),
    steps: int = 400,
    limit: int | None = None,
    speed_steps: int = 4,
    rounds: int = 5,
    model: str = "roberta-base",
    task: str = "sst2",
) -> dict[str, Any]:
    """The record: `quality` by form, `inference` by precision, `speed` by form; sizes in bytes, times in seconds.

    Args:
        forms: keys of `FORMS`.
        steps: optimiser steps of each training that is scored.
        limit: how many validation rows are scored; without it all.
        speed_steps, rounds: of the timed training, as in `benchmark_train`.
        model: the shape that is timed, with random weights.

    Raises:
        ConfigError: an unknown form, or one whose package is not installed.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise ConfigError(f"--forms: expected some of {', '.join(FORMS)}, found {', '.join(unknown)}")
    return {
        "work": {"task": task, "model": model, "steps": steps, "speed_steps": speed_steps, "rounds": rounds},
        **_quality(data_dir, forms, steps, limit, task),
        "speed": _speed(data_dir, forms, speed_steps, rounds, model, task),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "git": git_state(),
    }


def _quality(data_dir: str | None, forms: Sequence[str], steps: int, limit: int | None, task: str) -> dict[str, Any]:
    """Each form trained and scored, and the answers of the first form in other precisions."""
    table = get_task(task)
    rows = table.load(data_dir, table.splits)
    split = table.evaluation_splits[0]
    scored = {table.train_split: rows[table.train_split]}
    scored |= {name: _first(rows[name], limit) for name in table.evaluation_splits}
    quality: dict[str, Any] = {}
    inference: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            logger.info("benchmark: training with a base in %s", form)
            config = _config(FORMS[form], task, data_dir)
            config["train"] |= {"max_steps": steps}
            config["output"] |= {"dir": folder, "name": form}
            run = train(RunConfig.from_dict(config, "benchmark"), rows=scored)
            saved = find_saved_model(run.weights)
            quality[form] = {
                "metrics": run.record.metrics[split],
                "seconds": run.record.timings["train"],
                "parameters": run.record.parameters,
                "merged": _merged(saved, scored[split]) if saved.model.quantised else None,
            }
            inference = inference or {"of": form, "precisions": _answers(saved, scored[split])}
    return {"quality": quality, "inference": inference}


def _merged(saved: SavedModel, rows: Dataset) -> dict[str, Any]:
    """The score after merging into the packed weights, and what that lost; medians over the projections."""
    predictor = Predictor.load(saved)
    beside = _logits(predictor, rows)
    merge(predictor.model)
    drifts = [asdict(drift) for drift in merge_drift(predictor.model).values()]
    logits = _logits(predictor, rows)
    return {
        "metrics": saved.task.score(logits, np.asarray(rows["label"])),
        "logits_moved": _moved(logits, beside),
        "drift": {key: statistics.median(drift[key] for drift in drifts) for key in drifts[0]},
    }


def _answers(saved: SavedModel, rows: Dataset) -> dict[str, Any]:
    """By precision the score, the speed, and how far the logits are from those in fp32."""
    answers, exact = {}, None
    for precision in PREDICTED:
        predictor = Predictor.load(saved, precision)
        _logits(predictor, _first(rows, 64))  # warms up
        begin = time.perf_counter()
        logits = _logits(predictor, rows)
        seconds = time.perf_counter() - begin
        exact = logits if exact is None else exact
        answers[precision] = {
            "metrics": saved.task.score(logits, np.asarray(rows["label"])),
            "logits_moved": _moved(logits, exact),
            "examples_per_second": len(rows) / seconds,
        }
    return answers


def _speed(
    data_dir: str | None, forms: Sequence[str], steps: int, rounds: int, model: str, task: str
) -> dict[str, Any]:
    """By form the training speed, and the memory by part."""
    configs: dict[str, RunConfig] = {}
    for form in forms:
        sections = _config(FORMS[form], task, data_dir)
        sections["model"] |= {"name": model, "init": "random", "tokenizer": "tiny-roberta", "dropout": 0.0}
        sections["train"] |= {"batch_size": 16, "hf": {}}
        configs[form] = RunConfig.from_dict(sections, "benchmark")
    rows = work_rows(next(iter(configs.values())), steps)
    with ExitStack() as stack:
        sides: dict[str, SideProcess] = {}
        for form, config in configs.items():
            logger.info("benchmark: building %s in %s", model, form)
            sides[form] = SideProcess(Work(OURS, config.to_dict(), rows, rounds + 1, 0.0))
            stack.callback(sides[form].stop)
        measured = take_turns(sides, rounds)
        memory = {form: side.finish()["memory"] for form, side in sides.items()}
    return {
        form: {
            "examples_per_second": summary([len(rows) / each["seconds"] for each in measured[form]]),
            "base_bytes": memory[form]["weights"] - memory[form]["trained_weights"],
            "memory": memory[form],
        }
        for form in forms
    }


def _config(model: Mapping[str, str], task: str, data_dir: str | None) -> dict[str, Any]:
    sections = load_config("tiny_sst2.yaml").to_dict()
    sections["model"] |= model
    sections["task"] |= {"name": task, "data_dir": data_dir}
    return sections


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows.select(range(min(len(rows), count or len(rows))))


def _logits(predictor: Predictor, rows: Dataset) -> np.ndarray:
    return predictor.logits({column: list(rows[column]) for column in predictor.task.text_columns})


def _moved(logits: np.ndarray, exact: np.ndarray) -> float:
    """The Frobenius norm of the difference over that of `exact`."""
    return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))


def add(kinds: Any) -> None:
    """Adds the verb `quantised` to the command line."""
    words = "what a quantised base costs in accuracy, and saves in time and memory"
    parser = kinds.add_parser("quantised", help=words, description=words)
    parser.add_argument("--data-dir", metavar="DIR", help="default: $LORA_HF_DATA_DIR, else the hub")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the record, as JSON")
    parser.add_argument("--forms", default=",".join(FORMS), metavar="FORM,...", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of each training that is scored")
    parser.add_argument("--limit", type=int, metavar="N", help="validation rows to score; default: all")
    parser.add_argument("--speed-steps", type=int, default=4, metavar="N", help="steps of a timed round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds, after an untimed one")
    parser.add_argument("--model", default="roberta-base", metavar="NAME", help="the shape that is timed")
    parser.add_argument("--task", default="sst2", metavar="NAME")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, and writes the record."""
    check_record(options.output)
    sizes = (options.steps, options.limit, options.speed_steps, options.rounds)
    write_record(
        options.output, measure(options.data_dir, options.forms.split(","), *sizes, options.model, options.task)
    )
