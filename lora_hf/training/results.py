"""What a trained model's answers are worth: scores on the record, warnings of what is no result, and every answer."""

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


def score_answers(
    record: RunRecord,
    task: Task,
    answers: Mapping[str, np.ndarray],
    rows: Mapping[str, Dataset],
    folder: Path,
    of: str = "",
) -> None:
    """Puts the scores of the answers for each evaluation split on the record, and keeps a classifier's in `folder`.

    Args:
        answers: by split the logits `(rows, num_labels)`, or of a task of generation what its `score` reads.
        of: the beginning of each warning, which names the run where there are several.
    """
    for split, found in answers.items():
        if task.model_kind == "causal-lm":
            record.metrics[split] = task.score(found, ())
            continue
        _write_predictions(folder / f"predictions-{split}.jsonl", task, rows[split], found)
        _score(record, task, split, found, rows, of)


def _score(record: RunRecord, task: Task, split: str, logits: np.ndarray, rows: Mapping[str, Dataset], of: str) -> None:
    """Puts the split's scores on the record, and says aloud what a person should not overlook."""
    labels, train_labels = np.asarray(rows[split]["label"]), np.asarray(rows[task.train_split]["label"])
    scores, majority = task.score(logits, labels), task.majority(labels, train_labels)
    record.metrics[split], record.majority[split] = scores, majority
    found = []
    if task.problem_type != "regression" and len(np.unique(logits.argmax(axis=1))) == 1:
        only = task.label_names[int(logits[0].argmax())]
        found.append(f"{split}: every row was answered {only!r}; the model has collapsed to one class")
    best = task.best_metric
    if scores[best] <= majority[best]:
        found.append(
            f"{split}: {best} {scores[best]:.4f} is no better than always giving one answer ({majority[best]:.4f}); "
            "train longer, or with another learning rate"
        )
    record.warnings += found
    for warning in found:
        logger.warning("%s%s", of, warning)


def _write_predictions(path: Path, task: Task, rows: Dataset, logits: np.ndarray) -> None:
    """One JSON object a row, in the order of the split: its place, the truth, the answer and the logits."""
    with path.open("w", encoding="utf-8") as file:
        for index, (label, row) in enumerate(zip(rows["label"], np.asarray(logits, dtype=float), strict=True)):
            regression = task.problem_type == "regression"
            answer = float(row.reshape(-1)[0]) if regression else int(row.argmax())
            line = {"row": index, "label": label, "prediction": answer, "logits": row.reshape(-1).round(6).tolist()}
            file.write(json.dumps(line) + "\n")


def draw_curves(record: RunRecord, path: Path) -> None:
    """Writes `curves.png` from the record's history."""
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
                right.axhline(majority, color=line.get_color(), linestyle=":", label=f"{label}, always one answer")
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    right.set(xlabel="epoch", title="Development scores")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{record.task}, {record.model}, {record.method}, seed {record.seed}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
