"""The official GLUE metric, without the script that `evaluate.load("glue", ...)` downloads at run time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_hf.core.errors import ConfigError, did_you_mean

METRIC_NAMES: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    # What a person's own data are scored by.
    "classification": ("accuracy", "macro_f1", "matthews_correlation"),
    "regression": ("pearson", "spearmanr"),
}


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task: `GlueMetric("mrpc").compute(predictions=[...], references=[...])`.

    `classification` and `regression` are the sets for data of other origin. Predictions and references are class ids,
    or scores for stsb and regression, both of shape (rows,). The values are Python floats,
    equal to the official metric's (`evaluate.load("glue", task)`) with one exception: where a correlation is undefined
    because one side is constant, Pearson and Spearman are 0.0, as Matthews' is by definition, and not NaN. NaN is not
    JSON, and as the first score of a run it would stay the best one. A NaN *prediction* still scores NaN.

    Raises:
        ConfigError: not a GLUE task.

    Source: Wang et al. 2019, "GLUE", section 3; F1 is of class 1.
    """

    def __init__(self, task: str) -> None:
        if task not in METRIC_NAMES:
            nearest = did_you_mean(task, METRIC_NAMES)
            raise ConfigError(f"no GLUE metric for the task {task!r}{nearest}; known: {', '.join(METRIC_NAMES)}")
        super().__init__(config_name=task, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # the base class would create a folder there, and nothing is kept on disk

    def _info(self) -> evaluate.MetricInfo:
        # The official metric's types.
        number = datasets.Value("float32" if self.config_name in ("stsb", "regression") else "int64")
        return evaluate.MetricInfo(
            description="The GLUE benchmark's metrics for one task.",
            citation="Wang et al. 2019, GLUE, https://gluebenchmark.com",
            features=datasets.Features({"predictions": number, "references": number}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {name: _METRICS[name](predictions, references) for name in METRIC_NAMES[self.config_name]}


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(accuracy_score(references, predictions))


def _f1(predictions: np.ndarray, references: np.ndarray) -> float:
    if not predictions.any() and not references.any():
        return 0.0  # what scikit-learn gives too where class 1 is neither predicted nor present, with a warning
    return float(f1_score(references, predictions))


def _macro_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """The mean F1 of all classes that are predicted or present."""
    return float(f1_score(references, predictions, average="macro"))


def _matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    if _is_constant(predictions) or _is_constant(references):
        return 0.0  # what scikit-learn gives too, where it may warn about a single label
    return float(matthews_corrcoef(references, predictions))


def _pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    return _correlation(pearsonr, predictions, references)


def _spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    return _correlation(spearmanr, predictions, references)


def _correlation(correlate: Callable[..., Any], predictions: np.ndarray, references: np.ndarray) -> float:
    if _is_constant(predictions) or _is_constant(references):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # nearly constant: the value stands
        return float(correlate(predictions, references)[0])


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) == 0)


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
