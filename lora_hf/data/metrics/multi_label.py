"""Metrics of rows with several labels, as scikit-learn computes them, and the thresholds that decide on a label."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

UNKNOWN = 0.5  # the threshold of a label that no row has


def score_label_sets(labels: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray) -> dict[str, float]:
    """Returns the metrics of 0/1 `labels` and `probabilities`, both `(rows, labels)`.

    F1 is that of the probabilities at or above their label's threshold. A label that no row has counts as 0 in the
    macro F1 and in the mean average precision.
    """
    from sklearn.metrics import average_precision_score, f1_score

    undefined: Any = 0  # scikit-learn's annotations know only its default, a text
    predictions = (probabilities >= thresholds).astype(int)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive class found")
        precision = average_precision_score(labels, probabilities, average="macro")
    return {
        "micro_f1": float(f1_score(labels, predictions, average="micro", zero_division=undefined)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=undefined)),
        "mean_average_precision": float(precision),
    }


def choose_thresholds(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, ...]:
    """Returns for each label the threshold with the highest F1 on these rows; 0.5 for a label that none of them has."""
    columns = zip(labels.T, probabilities.T, strict=True)
    return tuple(_best_threshold(*column) if column[0].any() else UNKNOWN for column in columns)


def _best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Of equally good thresholds the highest. It lies halfway to the next lower probability, so that rounding in
    another batch or precision flips no row."""
    order = np.argsort(-probabilities, kind="stable")
    ordered, hits = probabilities[order], labels[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(ordered) + 1) + hits[-1])
    last_of_its_value = np.append(ordered[1:] < ordered[:-1], True)
    best = int(np.where(last_of_its_value, f1, -1).argmax())
    lower = ordered[best + 1] if best + 1 < len(ordered) else 0.0
    return float((ordered[best] + lower) / 2)
