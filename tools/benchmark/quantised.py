"""`quantised`: the accuracy, speed and memory of each storage format of the frozen base.

Each format is measured twice. First, tiny-roberta is trained and scored on SST-2, then scored again after merging into
a quantized base; the first run is also scored with int8 products. Then training steps of roberta-base with random
weights give the speed and the memory, with one process per format.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from lora_hf.adapters.resolve import SavedModel, find_saved_model
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.lora.inject import merge, merge_drift
from lora_hf.training.run import train
from tools.benchmark.job import FORMATS, OURS, Job
from tools.benchmark.rounds import measure, spread
from tools.benchmark.rows import training_rows

logger = logging.getLogger(__name__)

INFERENCE_PRECISIONS = ("fp32", "bf16", "int8")


def benchmark_quantised(
    data_dir: str | None,
    formats: Sequence[str] = tuple(FORMATS),
    steps: int = 400,
    limit: int | None = None,
    speed_steps: int = 4,
    rounds: int = 5,
    model: str = "roberta-base",
    task: str = "sst2",
) -> dict[str, Any]:
    """Measures each format, and returns the record.

    Args:
        formats: keys of `FORMATS`.
        steps: optimizer steps of each training run that is scored.
        limit: how many validation rows to score; all if None.
        speed_steps, rounds: of the timed training, as in `benchmark_train`.
        model: the model whose shape is timed, with random weights.

    Returns:
        `quality` by format, `inference` by precision and `speed` by format. Sizes are in bytes, times in seconds.

    Raises:
        ConfigError: an unknown format, or one whose package is not installed.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ConfigError(f"--forms: expected some of {', '.join(FORMATS)}, found {', '.join(unknown)}")
    return {
        "work": {"task": task, "model": model, "steps": steps, "speed_steps": speed_steps, "rounds": rounds},
        **_quality(data_dir, formats, steps, limit, task),
        "speed": _speed(data_dir, formats, speed_steps, rounds, model, task),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "git": git_state(),
    }


def _quality(
    data_dir: str | None, formats: Sequence[str], steps: int, limit: int | None, task_name: str
) -> dict[str, Any]:
    """Trains and scores each format, and scores the run of the first one in several precisions."""
    task = get_task(task_name)
    splits = task.load(data_dir, task.splits)
    rows = {task.train_split: splits[task.train_split]}
    rows |= {split: _head(splits[split], limit) for split in task.evaluation_splits}
    validation = task.evaluation_splits[0]
    quality: dict[str, Any] = {}
    inference: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in formats:
            logger.info("benchmark: training with a base in %s", name)
            sections = _config(FORMATS[name], task_name, data_dir)
            sections["train"] |= {"max_steps": steps}
            sections["output"] |= {"dir": folder, "name": name}
            run = train(RunConfig.from_dict(sections, "benchmark"), rows=rows)
            saved = find_saved_model(run.weights)
            quality[name] = {
                "metrics": run.record.metrics[validation],
                "seconds": run.record.timings["train"],
                "parameters": run.record.parameters,
                "merged": _merged(saved, rows[validation]) if saved.model.quantised else None,
            }
            inference = inference or {"of": name, "precisions": _inference(saved, rows[validation])}
    return {"quality": quality, "inference": inference}


def _merged(saved: SavedModel, rows: Dataset) -> dict[str, Any]:
    """The score after merging into the quantized weights, and the rounding errors: medians over the projections."""
    predictor = Predictor.load(saved)
    unmerged = _logits(predictor, rows)
    merge(predictor.model)
    drifts = [asdict(drift) for drift in merge_drift(predictor.model).values()]
    logits = _logits(predictor, rows)
    return {
        "metrics": saved.task.score_rows(logits, rows),
        "logits_moved": _relative_difference(logits, unmerged),
        "drift": {key: statistics.median(drift[key] for drift in drifts) for key in drifts[0]},
    }


def _inference(saved: SavedModel, rows: Dataset) -> dict[str, Any]:
    """For each precision the score, the speed, and the difference of the logits from fp32."""
    results, exact = {}, None
    for precision in INFERENCE_PRECISIONS:
        predictor = Predictor.load(saved, precision)
        _logits(predictor, _head(rows, 64))  # warm-up
        start = time.perf_counter()
        logits = _logits(predictor, rows)
        seconds = time.perf_counter() - start
        exact = logits if exact is None else exact
        results[precision] = {
            "metrics": saved.task.score_rows(logits, rows),
            "logits_moved": _relative_difference(logits, exact),
            "examples_per_second": len(rows) / seconds,
        }
    return results


def _speed(
    data_dir: str | None, formats: Sequence[str], steps: int, rounds: int, model: str, task: str
) -> dict[str, Any]:
    """For each format the training speed and the memory."""
    configs: dict[str, RunConfig] = {}
    for name in formats:
        sections = _config(FORMATS[name], task, data_dir)
        sections["model"] |= {"name": model, "init": "random", "tokenizer": "tiny-roberta", "dropout": 0.0}
        sections["train"] |= {"batch_size": 16, "hf": {}}
        configs[name] = RunConfig.from_dict(sections, "benchmark")
    rows = training_rows(next(iter(configs.values())), steps)
    sides = measure({name: Job(OURS, config.to_dict(), rows, rounds + 1) for name, config in configs.items()})
    memory = {name: side.done["memory"] for name, side in sides.items()}
    return {
        name: {
            "examples_per_second": spread([len(rows) / each for each in side.seconds]),
            "base_bytes": memory[name]["weights"] - memory[name]["trained_weights"],
            "memory": memory[name],
        }
        for name, side in sides.items()
    }


def _config(model: Mapping[str, str], task: str, data_dir: str | None) -> dict[str, Any]:
    sections = load_config("tiny_sst2.yaml").to_dict()
    sections["model"] |= model
    sections["task"] |= {"name": task, "data_dir": data_dir}
    return sections


def _head(rows: Dataset, count: int | None) -> Dataset:
    return rows.select(range(min(len(rows), count or len(rows))))


def _logits(predictor: Predictor, rows: Dataset) -> np.ndarray:
    return predictor.logits({column: list(rows[column]) for column in predictor.task.text_columns})


def _relative_difference(logits: np.ndarray, exact: np.ndarray) -> float:
    """The Frobenius norm of the difference, relative to that of `exact`."""
    return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
