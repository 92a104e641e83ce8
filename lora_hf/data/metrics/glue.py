"""The official GLUE metric, without the script that `evaluate.load("glue", ...)` downloads at run time."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from lora_hf.core.errors import ConfigError, did_you_mean
from lora_hf.data.metrics.classification import compute_metrics

METRIC_NAMES: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    # For custom tasks.
    "classification": ("accuracy", "macro_f1", "matthews_correlation"),
    "regression": ("pearson", "spearmanr"),
}


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task: `GlueMetric("mrpc").compute(predictions=[...], references=[...])`.

    `classification` and `regression` are the metrics of custom tasks. Predictions and references are `(rows,)`: class
    ids, or scores for stsb and regression. The values are Python floats and equal those of the official metric
    (`evaluate.load("glue", task)`), except that the correlations with a constant side, which are undefined, are 0.0
    instead of NaN: JSON has no NaN, and a NaN as the first score of a run would stay the best one. A NaN *prediction*
    scores NaN.

    Raises:
        ConfigError: unknown task.

    Source: Wang et al. 2019, "GLUE", section 3; F1 is of class 1.
    """

    def __init__(self, task: str) -> None:
        if task not in METRIC_NAMES:
            nearest = did_you_mean(task, METRIC_NAMES)
            raise ConfigError(f"no GLUE metric for the task {task!r}{nearest}; known: {', '.join(METRIC_NAMES)}")
        super().__init__(config_name=task, keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # the base class would create a folder; this metric keeps nothing on disk

    def _info(self) -> evaluate.MetricInfo:
        # The types of the official metric.
        number = datasets.Value("float32" if self.config_name in ("stsb", "regression") else "int64")
        return evaluate.MetricInfo(
            description="The GLUE benchmark's metrics for one task.",
            citation="Wang et al. 2019, GLUE, https://gluebenchmark.com",
            features=datasets.Features({"predictions": number, "references": number}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return compute_metrics(METRIC_NAMES[self.config_name], references, predictions)
