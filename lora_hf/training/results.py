"""What a run measured: scores of the outputs, warnings about results that mean nothing, and the picture of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset

from lora_hf.core.records import RunRecord
from lora_hf.data.tasks.base import Task

logger = logging.getLogger(__name__)


def score_outputs(
    record: RunRecord,
    task: Task,
    outputs: Mapping[str, np.ndarray],
    rows: Mapping[str, Dataset],
    folder: Path,
    log_prefix: str = "",
) -> None:
    """Puts the scores of each evaluation split on the record, and writes a classifier's predictions to `folder`.

    Args:
        outputs: by split the logits `(rows, num_labels)`, or for a generation task what its `score` takes.
        log_prefix: opens each warning, to name the run where there are several.
    """
    for split, values in outputs.items():
        if task.model_kind == "causal-lm":
            record.metrics[split] = task.score(values, ())
            continue
        _write_predictions(folder / f"predictions-{split}.jsonl", task, rows[split], values)
        _score_classifier(record, task, split, values, rows, log_prefix)


def _score_classifier(
    record: RunRecord, task: Task, split: str, logits: np.ndarray, rows: Mapping[str, Dataset], log_prefix: str
) -> None:
    labels, train_labels = np.asarray(rows[split]["label"]), np.asarray(rows[task.train_split]["label"])
    scores, majority = task.score(logits, labels), task.majority(labels, train_labels)
    record.metrics[split], record.majority[split] = scores, majority
    warnings = []
    if task.problem_type != "regression" and len(np.unique(logits.argmax(axis=1))) == 1:
        only = task.label_names[int(logits[0].argmax())]
        warnings.append(f"{split}: the model predicts {only!r} for every row; it has collapsed to one class")
    best = task.best_metric
    if scores[best] <= majority[best]:
        warnings.append(
            f"{split}: {best} {scores[best]:.4f} is no better than the majority class ({majority[best]:.4f}); train "
            "longer, or with another learning rate"
        )
    record.warnings += warnings
    for warning in warnings:
        logger.warning("%s%s", log_prefix, warning)


def _write_predictions(path: Path, task: Task, rows: Dataset, logits: np.ndarray) -> None:
    """One JSON object a row, in the order of the split: row number, label, prediction and logits."""
    with path.open("w", encoding="utf-8") as file:
        for index, (label, row) in enumerate(zip(rows["label"], np.asarray(logits, dtype=float), strict=True)):
            regression = task.problem_type == "regression"
            prediction = float(row.reshape(-1)[0]) if regression else int(row.argmax())
            line = {"row": index, "label": label, "prediction": prediction, "logits": row.reshape(-1).round(6).tolist()}
            file.write(json.dumps(line) + "\n")


def draw_curves(record: RunRecord, path: Path) -> None:
    """Plots training loss and development scores against the epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
