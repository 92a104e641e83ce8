"""Metrics of class ids and scores over rows that may be weighted, as in a bootstrap.

Every metric takes labels `(rows,)`, predictions `(rows,)` and weights `(resamples, rows)`, which say how often each row
counts, and returns `(resamples,)`. Undefined values are 0. With weights of 1 the values are those of scikit-learn and
scipy; this module needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NEARLY_CONSTANT = 1e-12  # a variance that counts as 0, relative to the mean square


def compute_metrics(names: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Returns the metrics of `(rows,)` predictions by name."""
    once = np.ones((1, len(labels)))
    return {name: float(METRICS[name](labels, predictions, once)[0]) for name in names}


def accuracy(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ (labels == predictions) / weights.sum(1)


def f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of class 1."""
    hits = weights @ ((labels == 1) & (predictions == 1))
    return _divide(2 * hits, weights @ (labels == 1) + weights @ (predictions == 1))


def macro_f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean F1 of the classes that occur in a resample's labels or predictions."""
    classes = np.union1d(labels, predictions)
    is_label, is_prediction = labels[:, None] == classes, predictions[:, None] == classes
    counts = weights @ is_label + weights @ is_prediction
    return _divide(2 * (weights @ (is_label & is_prediction)), counts).sum(1) / (counts > 0).sum(1)


def matthews_correlation(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The correlation of labels and predictions as indicator vectors of the classes.

    Source: Gorodkin 2004, Computational Biology and Chemistry 28, equation 8.
    """
    total, correct = weights.sum(1), weights @ (labels == predictions)
    classes = np.union1d(labels, predictions)
    label_counts, prediction_counts = (weights @ (side[:, None] == classes) for side in (labels, predictions))
    square = (total**2 - (label_counts**2).sum(1)) * (total**2 - (prediction_counts**2).sum(1))
    return _divide(correct * total - (label_counts * prediction_counts).sum(1), np.sqrt(square))


def pearson(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    x, y = labels - labels.mean(), predictions - predictions.mean()
    return _correlation(weights @ np.stack([x, y, x * x, y * y, x * y], axis=1) / weights.sum(1, keepdims=True))


def spearman(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    x, y = _ranks(labels, weights), _ranks(predictions, weights)
    wx, wy = weights * x, weights * y
    sums = [wx.sum(1), wy.sum(1), *(np.einsum("br,br->b", *pair) for pair in ((wx, x), (wy, y), (wx, y)))]
    return _correlation(np.stack(sums, axis=1) / weights.sum(1, keepdims=True))


def _correlation(means: np.ndarray) -> np.ndarray:
    """Pearson's correlation from the means `(resamples, 5)` of x, y, xx, yy and xy."""
    x, y, xx, yy, xy = means.T
    variances = [np.where(square - mean**2 <= NEARLY_CONSTANT * square, 0.0, square - mean**2)
                 for mean, square in ((x, xx), (y, yy))]  # fmt: skip
    return _divide(xy - x * y, np.sqrt(variances[0] * variances[1]))


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns `(resamples, rows)`: the rank of each row minus the mean rank; equal values share their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered, side="left")
    last = np.searchsorted(ordered, ordered, side="right")
    cumulative = np.concatenate([np.zeros((len(weights), 1)), weights[:, order].cumsum(1)], axis=1)
    ranks = np.empty_like(weights)
    ranks[:, order] = (cumulative[:, first] + cumulative[:, last] - cumulative[:, -1:]) / 2
    ranks[:, np.isnan(values)] = np.nan
    return ranks


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearman,
}
