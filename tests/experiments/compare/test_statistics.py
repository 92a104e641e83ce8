from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hf.data.metrics.classification import compute_metrics
from lora_hf.data.metrics.glue import METRIC_NAMES, GlueMetric
from lora_hf.experiments.compare.statistics import bootstrap, bootstrap_p, holm, interval, mcnemar
from tests.tolerances import COVERAGE, OFFICIAL_SCORE, RESAMPLED_SCORE

RNG = np.random.default_rng(5)


def drawn(task: str, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and predictions that are right more often than not."""
    if task in ("stsb", "regression"):
        labels = RNG.integers(0, 11, rows) / 2.0
        return labels, np.round(labels + RNG.normal(size=rows), 1)
    classes = 3 if task in ("mnli", "classification") else 2
    labels = RNG.integers(0, classes, rows)
    return labels, np.where(RNG.random(rows) < 0.7, labels, RNG.integers(0, classes, rows))


@pytest.mark.parametrize("task", METRIC_NAMES)
def test_scores_are_the_official_metrics(task: str) -> None:
    labels, predictions = drawn(task)
    official = GlueMetric(task).compute(predictions=predictions, references=labels)
    assert compute_metrics(METRIC_NAMES[task], labels, predictions) == pytest.approx(official, abs=OFFICIAL_SCORE)


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb"])
def test_constant_answers_score_as_the_official_metric_says(task: str) -> None:
    labels, _ = drawn(task)
    for constant in (0.0, 1.0):
        predictions = np.full(len(labels), constant if task == "stsb" else int(constant))
        official = GlueMetric(task).compute(predictions=predictions, references=labels)
        assert compute_metrics(METRIC_NAMES[task], labels, predictions) == pytest.approx(official, abs=OFFICIAL_SCORE)


@pytest.mark.parametrize("task", ["mrpc", "stsb", "cola", "classification"])
def test_a_resample_is_scored_as_its_rows_would_be(task: str) -> None:
    """The resamples' mean and spread equal those of rows drawn and scored one resample at a time."""
    labels, predictions = drawn(task, rows=40)
    names = METRIC_NAMES[task]
    quick = bootstrap(names, labels, predictions[None], resamples=4000)
    draw = np.random.default_rng(9)
    plain = []
    for _ in range(600):
        rows = draw.integers(0, len(labels), len(labels))
        plain.append(list(compute_metrics(names, labels[rows], predictions[rows]).values()))
    for column, name in zip(np.array(plain).T, names, strict=True):
        assert quick[name].mean() == pytest.approx(column.mean(), abs=RESAMPLED_SCORE)
        assert quick[name].std() == pytest.approx(column.std(), abs=RESAMPLED_SCORE)


def test_rows_are_resampled_together_for_all_runs() -> None:
    labels, predictions = drawn("sst2")
    found = bootstrap(("accuracy",), labels, np.stack([predictions, predictions, 1 - predictions]), resamples=200)
    first, same, opposite = found["accuracy"].T
    assert np.array_equal(first, same)
    assert first + opposite == pytest.approx(np.ones(200))
    assert first.std() > 0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    truth, rows, repetitions = 0.8, 250, 300
    draw = np.random.default_rng(3)
    covered, narrow = 0, 0
    for seed in range(repetitions):
        right = (draw.random(rows) < truth).astype(int)
        values = bootstrap(("accuracy",), np.ones(rows), right[None], 400, seed)["accuracy"][:, 0]
        (low, high), (inner_low, inner_high) = interval(values), interval(values, 0.85)
        covered += low <= truth <= high
        narrow += inner_low <= truth <= inner_high
    assert covered / repetitions == pytest.approx(0.95, abs=COVERAGE)
    assert narrow / repetitions != pytest.approx(0.95, abs=COVERAGE)


def test_the_paired_difference_finds_what_is_there_and_nothing_else() -> None:
    labels = np.tile([0, 1], 200)
    good = labels.copy()
    good[:40] = 1 - good[:40]
    bad = labels.copy()
    bad[:90] = 1 - bad[:90]
    values = bootstrap(("accuracy",), labels, np.stack([good, bad, np.roll(good, 100)]))["accuracy"]
    assert bootstrap_p(values[:, 0] - values[:, 1]) < 0.001
    assert bootstrap_p(values[:, 0] - values[:, 2]) > 0.5, "as many errors, on other rows"
    assert bootstrap_p(values[:, 0] - values[:, 0]) == 1.0


def test_mcnemar_by_hand() -> None:
    first = np.array([True] * 9 + [False] * 1 + [True] * 50 + [False] * 20)
    second = np.array([False] * 9 + [True] * 1 + [True] * 50 + [False] * 20)
    found = mcnemar(first, second)
    # Of ten coins nine or more, or one or fewer, fall on one side: 2 * (10 + 1) of 1024.
    assert found == {"only_first": 9, "only_second": 1, "p": pytest.approx(22 / 1024)}
    assert mcnemar(second, first)["p"] == found["p"]
    assert mcnemar(first, first)["p"] == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.6]) == pytest.approx([0.04, 0.09, 0.09, 0.6])
    assert holm([]) == []
    assert holm([0.7, 0.8]) == [1.0, 1.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_nothing_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    assert [corrected[index] for index in order] == sorted(corrected)
    for p, adjusted in zip(p_values, corrected, strict=True):
        assert p <= adjusted <= min(1.0, p * len(p_values)) + 1e-12
