"""The loss of a classifier with class weights and label smoothing, for one or several labels per row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lora_hf.core.config.schema import TrainConfig
from lora_hf.data.tasks.base import ProblemType, Task
from lora_hf.data.tasks.classification import TextClassification

logger = logging.getLogger(__name__)

CUSTOM = ("classification", "multi_label")  # the kinds of tasks that choose their metric
SKEWED = 10  # how many times as many rows the largest class has as the smallest

Loss = Callable[[Tensor, Tensor], Tensor]


def classifier_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: ProblemType | None,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Returns the mean loss of logits `(rows, num_labels)`, as transformers models compute it.

    Args:
        labels: class ids `(rows,)`, scores `(rows,)` or, for several labels per row, 0 and 1 `(rows, num_labels)`.
        weights: `(num_labels,)`: the weight of each class in the mean or, for several labels per row, of the rows that
            have the label.
        smoothing: the share of the target that is spread evenly over the classes or, for several labels per row, over
            having the label and not having it.
    """
    if problem_type == "regression":
        return mse_loss(logits.reshape(-1), labels.to(logits.dtype))
    if problem_type == "multi_label_classification":
        targets = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return binary_cross_entropy_with_logits(logits, targets, pos_weight=_like(weights, logits))
    return cross_entropy(logits, labels, weight=_like(weights, logits), label_smoothing=smoothing)


def _like(weights: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if weights is None else weights.to(logits)


def configured_loss(task: Task, train: TrainConfig, rows: Dataset) -> Loss | None:
    """Returns the loss that a config asks for; None if the model and the Trainer already compute it.

    Warns about heavily skewed classes without weights.

    Args:
        rows: the training rows.
    """
    if not isinstance(task, TextClassification) or not task.label_names:
        return None
    counts = task.count_classes(rows)
    if train.class_weights is None:
        _warn_about_skew(task, counts)
        if task.problem_type != "multi_label_classification" or not train.label_smoothing:
            return None
    weights = class_weights(task, train.class_weights, counts, len(rows))
    return partial(classifier_loss, problem_type=task.problem_type, weights=weights, smoothing=train.label_smoothing)


def class_weights(task: Task, chosen: str | dict[str, float] | None, counts: np.ndarray, rows: int) -> Tensor | None:
    """Returns the weight of each class, `(num_labels,)`.

    `balanced` is scikit-learn's: the mean number of rows per class, divided by the number of rows of this class. With
    several labels per row, it is the number of rows without the label, divided by the number with it. A class without
    rows has weight 1.
    """
    if chosen is None:
        return None
    if isinstance(chosen, dict):
        return torch.tensor([chosen.get(name, 1.0) for name in task.label_names])
    present = np.maximum(counts, 1)
    if task.problem_type == "multi_label_classification":
        balanced = np.where((counts > 0) & (counts < rows), (rows - counts) / present, 1.0)
    else:
        balanced = np.where(counts > 0, rows / ((counts > 0).sum() * present), 1.0)
    return torch.from_numpy(balanced).float()


def _warn_about_skew(task: TextClassification, counts: np.ndarray) -> None:
    found = np.flatnonzero(counts)
    if not len(found):
        return
    most, least = found[counts[found].argmax()], found[counts[found].argmin()]
    by_metric = task.metric in CUSTOM and task.best_metric != "macro_f1"
    if counts[most] >= SKEWED * counts[least]:
        logger.warning(
            "%s: the classes are skewed: %d training rows have %r, and %d have %r; train.class_weights=balanced gives "
            "them equal weight%s",
            task.name, counts[most], task.label_names[most], counts[least], task.label_names[least],
            ", and task.metric=macro_f1 scores them equally" if by_metric else "",
        )  # fmt: skip
