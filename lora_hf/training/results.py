"""Evaluates a run: scores its outputs, warns of meaningless results, and draws its plots."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lora_hf.core.provenance import peak_rss
from lora_hf.core.records import RunRecord
from lora_hf.data.metrics.evaluation import never_predicted
from lora_hf.data.tasks.base import Task
from lora_hf.training.evaluation_plots import draw_evaluation, load_pyplot
from lora_hf.training.run_dir import CURVES
from lora_hf.training.trainer import RunTrainer

logger = logging.getLogger(__name__)


def score_outputs(
    record: RunRecord,
    task: Task,
    outputs: Mapping[str, Any],
    rows: Mapping[str, Dataset],
    folder: Path,
    log_prefix: str = "",
) -> Task:
    """Records the scores of each evaluation split, and writes the predictions for its rows to `folder`.

    Args:
        outputs: the result of the task's `row_outputs`, by split.
        log_prefix: starts each warning, to name the run if there are several.

    Returns:
        The task with the settings that it chooses on the first split, such as thresholds.
    """
    for number, (split, values) in enumerate(outputs.items()):
        if not number:
            task = task.calibrated(values, rows[split])
        scores = task.score_rows(values, rows[split])
        majority = task.majority_of_rows(rows[split], rows[task.train_split])
        record.metrics[split] = scores
        found = task.evaluation(values, rows[split])
        if found:
            record.evaluation[split] = found
        warnings = task.weaknesses(values) or never_predicted(found)
        if majority:
            record.majority[split] = majority
            warnings += _no_better_than(majority, scores, task.best_metric)
        for warning in warnings:
            record.warnings.append(f"{split}: {warning}")
            logger.warning("%s%s: %s", log_prefix, split, warning)
        _write_predictions(folder / f"predictions-{split}.jsonl", task.prediction_lines(values, rows[split]))
    return task


def record_training(record: RunRecord, trainer: RunTrainer, metrics: Mapping[str, float], log_prefix: str) -> None:
    """Records the history and the cost of the training.

    Args:
        metrics: the Trainer's metrics.
    """
    state, skipped = trainer.state, trainer.loss_scaling.skipped
    if skipped:
        record.warnings.append(f"{skipped} of {state.global_step} steps were skipped: a gradient overflowed fp16")
        logger.warning("%s%s", log_prefix, record.warnings[-1])
    record.skipped_steps = skipped
    record.history = state.log_history
    record.best = {
        "metric": trainer.args.metric_for_best_model,
        "value": state.best_metric,
        "step": state.best_global_step,
    }
    record.throughput = {key: metrics.get(f"train_{key}_per_second", 0.0) for key in ("samples", "steps")}
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    record.memory = {"rss": peak_rss(), "cuda": cuda}


def _no_better_than(majority: Mapping[str, float], scores: Mapping[str, float], metric: str) -> list[str]:
    if scores[metric] > majority[metric]:
        return []
    found = f"{metric} {scores[metric]:.4f} is no better than the majority class ({majority[metric]:.4f})"
    return [f"{found}; train longer, or with another learning rate"]


def _write_predictions(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Writes one JSON object per row, in the order of the split. Tasks without lines get no file."""
    if first := next(lines, None):
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in itertools.chain([first], lines))


def draw_run(record: RunRecord, folder: Path) -> None:
    """Draws the curves and, for a classifier, its errors on each split."""
    for split, found in record.evaluation.items():
        draw_evaluation(found, f"{record.task}, {split}", folder, split)
    _draw_curves(record, folder / CURVES)


def _draw_curves(record: RunRecord, path: Path) -> None:
    """Plots training loss and development scores against the epoch."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    figure.subplots_adjust(0.06, 0.13, 0.98, 0.84, wspace=0.14)  # matplotlib's own layout draws everything twice
    steps = [entry for entry in record.history if "loss" in entry]
    left.plot([entry["epoch"] for entry in steps], [entry["loss"] for entry in steps], label="training")
    for split, scores in record.metrics.items():
        at = [entry for entry in record.history if f"eval_{split}_loss" in entry]
        epochs = [entry["epoch"] for entry in at]
        left.plot(epochs, [entry[f"eval_{split}_loss"] for entry in at], marker="o", label=split)
        for metric in scores:
            values = [entry[f"eval_{split}_{metric}"] for entry in at]
            label = metric if len(record.metrics) == 1 else f"{metric}, {split}"
            (line,) = right.plot(epochs, values, marker="o", label=label)
            majority = record.majority.get(split, {}).get(metric)
            if majority is not None:
                right.axhline(majority, color=line.get_color(), linestyle=":", label=f"{label}, majority class")
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    right.set(xlabel="epoch", title="Development scores")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{record.task}, {record.model}, {record.method}, seed {record.seed}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
