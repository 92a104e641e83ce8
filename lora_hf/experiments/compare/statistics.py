"""Confidence intervals and significance tests: the bootstrap over rows, McNemar's test, Holm's correction.

All runs are scored on the same resampled rows, so that differences between runs are paired. The bootstrap draws
patterns instead of rows: rows with the same label and the same predictions of all runs are one pattern, and their
counts are multinomial. The distribution is the same, for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_hf.data.metrics.classification import METRICS

RESAMPLES = 10_000
SEED = 0
CONFIDENCE = 0.95
CHUNK = 500  # resamples at a time: 6 MB of weights for the 1,500 rows of STS-B


def bootstrap(
    names: Sequence[str],
    labels: np.ndarray,
    predictions: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, np.ndarray]:
    """Returns the metrics of every run over the same resampled rows, by name as `(resamples, runs)`.

    Args:
        names: keys of `METRICS`.
        labels: `(rows,)`, class ids or scores.
        predictions: `(runs, rows)`.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 13.
    """
    patterns, counts = np.unique(np.vstack([labels, predictions]).astype(np.float64), axis=1, return_counts=True)
    generator, rows = np.random.default_rng(seed), len(labels)
    results = {name: np.empty((resamples, len(predictions))) for name in names}
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights = generator.multinomial(rows, counts / rows, size=size).astype(np.float64)
        for run, run_predictions in enumerate(patterns[1:]):
            for name in names:
                results[name][start : start + size, run] = METRICS[name](patterns[0], run_predictions, weights)
    return results


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the percentile interval of `(resamples,)` values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_p(differences: np.ndarray) -> float:
    """Returns the two-sided p-value of no difference: the lowest level at which the percentile interval excludes zero.

    It is never 0, because the observed sample counts as another resample (Davison and Hinkley 1997, section 4.2).
    """
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))


def mcnemar(first_correct: np.ndarray, second_correct: np.ndarray) -> dict[str, Any]:
    """Returns McNemar's exact test of two runs on the same rows, from `(rows,)` of bool each.

    `only_first` and `only_second` are the numbers of rows that only this run predicts correctly, `p` is two-sided.

    Source: McNemar 1947, Psychometrika 12; for classifiers Dietterich 1998, Neural Computation 10, section 3.1.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first_correct & ~second_correct).sum()), int((second_correct & ~first_correct).sum())
    differing = only_first + only_second
    p = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values in their order, corrected for multiple tests (family-wise error rate).

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * np.asarray(p_values)[order])
    return np.minimum(corrected, 1.0).tolist()
