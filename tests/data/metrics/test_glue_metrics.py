"""The metrics of classes and scores against values by hand, scikit-learn and scipy. conftest cuts the network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_hf.core.errors import ConfigError
from lora_hf.data.metrics.classification import METRICS, compute_metrics
from lora_hf.data.metrics.glue import METRIC_NAMES, GlueMetric
from tests.tolerances import METRIC_VALUE

RNG = np.random.default_rng(7)


def compute(task: str, predictions: object, references: object) -> dict[str, float]:
    return GlueMetric(task).compute(predictions=predictions, references=references) or {}


@pytest.mark.parametrize("task", ["sst2", "mnli", "qnli", "rte"])
def test_accuracy_by_hand(task: str) -> None:
    assert compute(task, [0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_f1_is_of_class_one(task: str) -> None:
    # Class 1: two right of three given (precision 2/3), two of two found (recall 1): F1 = 2*(2/3)*1 / (2/3+1) = 4/5.
    # Class 0, which must not be taken: one of one (precision 1), one of two (recall 1/2): F1 = 2/3.
    assert compute(task, [1, 1, 1, 0], [1, 1, 0, 0]) == {"accuracy": 0.75, "f1": pytest.approx(0.8)}


def test_matthews_by_hand() -> None:
    # tp 2, tn 1, fp 1, fn 0: (2*1 - 1*0) / sqrt((2+1)(2+0)(1+1)(1+0)) = 2 / sqrt(12)
    assert compute("cola", [1, 1, 1, 0], [1, 1, 0, 0]) == {"matthews_correlation": pytest.approx(2 / math.sqrt(12))}


def test_correlations_by_hand() -> None:
    # x = 1 2 3, y = 1 2 9 (means 2 and 4): sum dx*dy = 3+0+5 = 8, sum dx^2 = 2, sum dy^2 = 9+4+25 = 38; ranks agree.
    scores = compute("stsb", [1.0, 2.0, 3.0], [1.0, 2.0, 9.0])
    assert scores == {"pearson": pytest.approx(8 / math.sqrt(76)), "spearmanr": pytest.approx(1.0)}


@pytest.mark.parametrize("classes", [2, 3])
def test_class_metrics_equal_scikit_learn(classes: int) -> None:
    labels, predictions = RNG.integers(0, classes, 500), RNG.integers(0, classes, 500)
    assert compute_metrics(("accuracy", "macro_f1", "matthews_correlation"), labels, predictions) == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predictions),
            "macro_f1": f1_score(labels, predictions, average="macro"),
            "matthews_correlation": matthews_corrcoef(labels, predictions),
        },
        abs=METRIC_VALUE,
    )
    if classes == 2:
        assert compute_metrics(("f1",), labels, predictions)["f1"] == pytest.approx(
            f1_score(labels, predictions), abs=METRIC_VALUE
        )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_correlations_equal_scipy(ties: bool, dtype: type) -> None:
    labels, predictions = RNG.normal(size=(2, 500)).round(1 if ties else 12).astype(dtype)
    in_double: Any = (
        labels.astype(np.float64),
        predictions.astype(np.float64),
    )  # scipy sums in the inputs' type
    assert compute_metrics(("pearson", "spearmanr"), labels, predictions) == pytest.approx(
        {"pearson": pearsonr(*in_double).statistic, "spearmanr": spearmanr(*in_double).statistic}, abs=METRIC_VALUE
    )


@pytest.mark.parametrize("name", METRICS)
def test_a_weight_counts_a_row_as_often(name: str) -> None:
    labels, predictions = RNG.integers(0, 4, 30).astype(float), RNG.integers(0, 4, 30).astype(float)
    weights = RNG.integers(0, 3, (5, 30))
    repeated = [compute_metrics((name,), np.repeat(labels, row), np.repeat(predictions, row))[name] for row in weights]
    assert METRICS[name](labels, predictions, weights.astype(float)) == pytest.approx(repeated, abs=METRIC_VALUE)


@pytest.mark.parametrize("task", METRIC_NAMES)
@pytest.mark.parametrize("rows", [1, 4])
def test_constant_predictions_score_without_a_warning(task: str, rows: int) -> None:
    # pyproject turns warnings into errors. Every value is a Python float: json.dumps refuses numpy's.
    scores = compute(task, [0] * rows, [0, 1, 1, 1][:rows])
    assert tuple(scores) == METRIC_NAMES[task]
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())
    assert all(value == 0.0 for name, value in scores.items() if name not in ("accuracy", "macro_f1"))


def test_nearly_constant_predictions_do_not_warn() -> None:
    assert math.isfinite(compute("stsb", [1e6, 1e6, 1e6 + 0.0625], [1.0, 2.0, 3.0])["pearson"])


def test_a_nan_prediction_is_not_hidden() -> None:
    assert all(math.isnan(value) for value in compute("stsb", [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]).values())


def test_unknown_task() -> None:
    with pytest.raises(
        ConfigError, match=r"no GLUE metric for the task 'sst3' \(did you mean 'sst2'\?\); known: cola, "
    ):
        GlueMetric("sst3")


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache")
    assert compute("sst2", [1], [1]) == {"accuracy": 1.0}
    assert not (tmp_path / "cache").exists()
