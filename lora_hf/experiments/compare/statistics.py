"""Uncertainty of scores and tests of differences: bootstrap over the rows of a split, McNemar's test, Holm.

All runs are scored on the same resampled rows, so differences between runs are paired. Rows with the same label and
the same predictions of all runs form a pattern. The number of times that a pattern is drawn is multinomial; drawing
these numbers is exactly the bootstrap over rows, and much faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 0
CONFIDENCE = 0.95
CHUNK = 500  # resamples at a time: 6 MB for the 1,500 rows of STS-B
NEARLY_CONSTANT = 1e-12  # variance relative to the mean square

Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class McNemar:
    """The number of rows that only one of two runs predicts right, and the two-sided p-value."""

    only_first: int
    only_second: int
    p: float


def scores(names: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """The metrics of `(rows,)` predictions; equal to `data.metrics.glue.GlueMetric`, without its imports."""
    once = np.ones((1, len(labels)))
    return {name: float(METRICS[name](labels, predictions, once)[0]) for name in names}


def bootstrap(
    names: Sequence[str],
    labels: np.ndarray,
    predictions: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, np.ndarray]:
    """The metrics of every run on the same resampled rows.

    Args:
        names: keys of `METRICS`.
        labels: `(rows,)`, class ids or scores.
        predictions: `(runs, rows)`.

    Returns:
        By metric: `(resamples, runs)`.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 13.
    """
    patterns, counts = np.unique(np.vstack([labels, predictions]).astype(np.float64), axis=1, return_counts=True)
    generator, rows = np.random.default_rng(seed), len(labels)
    values = {name: np.empty((resamples, len(predictions))) for name in names}
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights = generator.multinomial(rows, counts / rows, size=size).astype(np.float64)
        for run, predicted in enumerate(patterns[1:]):
            for name in names:
                values[name][start : start + size, run] = METRICS[name](patterns[0], predicted, weights)
    return values


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of `(resamples,)` values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_p(differences: np.ndarray) -> float:
    """Two-sided p-value of a difference: the lowest level at which the percentile interval excludes zero.

    Never 0: the original sample counts as one more resample (Davison and Hinkley 1997, section 4.2).
    """
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> McNemar:
    """McNemar's exact test: if two runs are equally good, each is equally likely to be the only one that is right.

    Args:
        first_right: `(rows,)` of bool, as `second_right`.

    Source: McNemar 1947, Psychometrika 12; for classifiers Dietterich 1998, Neural Computation 10, section 3.1.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    differing = only_first + only_second
    p = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return McNemar(only_first, only_second, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values in their order, corrected for multiple tests: controls the family-wise error rate.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


# Metrics of `(rows,)` labels and predictions with `(resamples, rows)` weights; each returns `(resamples,)`.


def _accuracy(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ (labels == predictions) / weights.sum(1)


def _f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hit = weights @ ((labels == 1) & (predictions == 1))
    return _over(2 * hit, weights @ (labels == 1) + weights @ (predictions == 1))


def _macro_f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean F1 of the classes among the labels or predictions of a resample."""
    classes = np.union1d(labels, predictions)
    truth, predicted = labels[:, None] == classes, predictions[:, None] == classes
    both = weights @ truth + weights @ predicted
    return _over(2 * (weights @ (truth & predicted)), both).sum(1) / (both > 0).sum(1)


def _matthews(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Gorodkin 2004, equation 8: the correlation of the two, as indicator vectors of the classes."""
    total, right = weights.sum(1), weights @ (labels == predictions)
    classes = np.union1d(labels, predictions)
    truth, predicted = (weights @ (side[:, None] == classes) for side in (labels, predictions))
    square = (total**2 - (truth**2).sum(1)) * (total**2 - (predicted**2).sum(1))
    return _over(right * total - (truth * predicted).sum(1), np.sqrt(square))


def _pearson(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    x, y = labels - labels.mean(), predictions - predictions.mean()
    return _correlation(weights @ np.stack([x, y, x * x, y * y, x * y], axis=1) / weights.sum(1, keepdims=True))


def _spearman(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    x, y = _ranks(labels, weights), _ranks(predictions, weights)
    wx, wy = weights * x, weights * y
    sums = [wx.sum(1), wy.sum(1), *(np.einsum("br,br->b", *pair) for pair in ((wx, x), (wy, y), (wx, y)))]
    return _correlation(np.stack(sums, axis=1) / weights.sum(1, keepdims=True))


def _correlation(means: np.ndarray) -> np.ndarray:
    """Pearson's correlation from the `(resamples, 5)` means of x, y, xx, yy and xy; 0 if x or y is constant."""
    x, y, xx, yy, xy = means.T
    variances = [np.where(square - mean**2 > NEARLY_CONSTANT * square, square - mean**2, 0.0)
                 for mean, square in ((x, xx), (y, yy))]  # fmt: skip
    return _over(xy - x * y, np.sqrt(variances[0] * variances[1]))


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The centered rank of each row in each resample, `(resamples, rows)`; equal values share their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered, side="left")
    last = np.searchsorted(ordered, ordered, side="right")
    reached = np.concatenate([np.zeros((len(weights), 1)), weights[:, order].cumsum(1)], axis=1)
    ranks = np.empty_like(weights)
    ranks[:, order] = (reached[:, first] + reached[:, last] - reached[:, -1:]) / 2
    return ranks


def _over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


METRICS: dict[str, Weighted] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
