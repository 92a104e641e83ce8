"""Scores by class, confusions and calibration equal scikit-learn's; thresholds equal an exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from lora_hf.data.metrics.evaluation import (
    SHOWN,
    calibration,
    evaluate_classes,
    evaluate_label_sets,
    evaluate_scores,
    never_predicted,
    with_texts,
)
from lora_hf.data.metrics.multi_label import choose_thresholds, score_label_sets

NAMES = ("a", "b", "c")


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def probabilities(draw: np.random.Generator, rows: int = 400) -> np.ndarray:
    return draw.dirichlet((1, 1, 0.3), rows)


def test_scores_by_class_are_those_of_scikit_learn(draw: np.random.Generator) -> None:
    labels, given = draw.integers(0, 3, 400), probabilities(draw)
    found = evaluate_classes(labels, given, NAMES)
    predicted = given.argmax(1)
    scores = precision_recall_fscore_support(labels, predicted, labels=range(3), zero_division=0)
    for name, *expected in zip(NAMES, *scores, strict=True):
        classes = found["classes"][name]
        assert [classes[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(expected)
    assert [found["classes"][name]["predicted"] for name in NAMES] == np.bincount(predicted, minlength=3).tolist()
    assert found["confusion"] == confusion_matrix(labels, predicted).tolist()


def test_the_bins_are_those_of_scikit_learn(draw: np.random.Generator) -> None:
    confidence = np.append(draw.random(500), [0.0, 1.0, 0.2, 1 / 15])  # also the edges of bins
    correct = draw.random(len(confidence)) < confidence**2
    found = calibration(correct, confidence)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15)
    assert [each["accuracy"] for each in found["bins"]] == pytest.approx(accuracy)
    assert [each["confidence"] for each in found["bins"]] == pytest.approx(mean)
    counts = np.array([each["count"] for each in found["bins"]])
    assert counts.sum() == len(confidence)
    assert found["ece"] == pytest.approx((counts * np.abs(accuracy - mean)).sum() / len(confidence))
    assert calibration(np.array([True]), np.array([1.0]))["ece"] == 0


def test_the_most_confident_mistakes_come_first(draw: np.random.Generator) -> None:
    labels, given = draw.integers(0, 3, 400), probabilities(draw)
    found = with_texts(evaluate_classes(labels, given, NAMES), {"text": [f"text {row}" for row in range(400)]})
    confidence = [mistake["confidence"] for mistake in found["mistakes"]]
    assert len(confidence) == SHOWN
    assert confidence == sorted(confidence, reverse=True)
    assert confidence[0] == pytest.approx(given.max(1)[given.argmax(1) != labels].max(), abs=1e-6)
    for mistake in found["mistakes"]:
        assert NAMES.index(mistake["label"]) == labels[mistake["row"]]
        assert NAMES.index(mistake["prediction"]) == given[mistake["row"]].argmax() != labels[mistake["row"]]
        assert mistake["texts"] == {"text": f"text {mistake['row']}"}


def test_a_class_that_is_never_predicted_is_named() -> None:
    found = evaluate_classes(np.array([0, 1, 2]), np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.4, 0]]), NAMES)
    (warning,) = never_predicted(found)
    assert "'c'" in warning
    assert "class_weights" in warning
    unseen = evaluate_classes(np.array([0, 1]), np.array([[0.9, 0.1, 0], [0.2, 0.8, 0]]), NAMES)
    assert never_predicted(unseen) == [], "no row has c"


def test_the_largest_errors_of_a_regression() -> None:
    found = evaluate_scores(np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, 1.0]))
    assert found["errors"]["mean_absolute_error"] == pytest.approx(2.5 / 3)
    assert found["mistakes"][0] == {"row": 2, "label": 3.0, "prediction": 1.0}


@pytest.fixture
def label_sets(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = (draw.random((300, 3)) < (0.5, 0.1, 0.02)).astype(int)
    return labels, np.clip(0.3 * labels + 0.7 * draw.random((300, 3)).round(2), 0, 1)  # with equal probabilities


def test_metrics_of_label_sets_are_those_of_scikit_learn(label_sets: tuple[np.ndarray, np.ndarray]) -> None:
    labels, given = label_sets
    thresholds = np.array([0.5, 0.4, 0.3])
    found = score_label_sets(labels, given, thresholds)
    predicted = (given >= thresholds).astype(int)
    assert found == {
        "micro_f1": pytest.approx(f1_score(labels, predicted, average="micro")),
        "macro_f1": pytest.approx(f1_score(labels, predicted, average="macro")),
        "mean_average_precision": pytest.approx(average_precision_score(labels, given)),
    }
    evaluation = evaluate_label_sets(labels, given, thresholds, NAMES)
    confusion = multilabel_confusion_matrix(labels, predicted).tolist()
    assert evaluation["confusion"] == dict(zip(NAMES, confusion, strict=True))
    assert evaluation["classes"]["b"]["threshold"] == 0.4
    assert evaluation["calibration"] == calibration(labels.reshape(-1) == 1, given.reshape(-1))


def test_no_threshold_scores_higher(label_sets: tuple[np.ndarray, np.ndarray]) -> None:
    labels, given = label_sets
    for column, threshold in enumerate(choose_thresholds(labels, given)):
        tried = np.append(np.unique(given[:, column]), 2.0)
        best = max(f1_score(labels[:, column], given[:, column] >= t, zero_division=0) for t in tried)
        assert f1_score(labels[:, column], given[:, column] >= threshold) == pytest.approx(best)
        assert np.abs(given[:, column] - threshold).min() > 1e-4, "no row lies on the threshold"


def test_thresholds_without_a_choice() -> None:
    assert choose_thresholds(np.array([[0, 1]] * 2), np.array([[0.3, 0.2]] * 2)) == (0.5, pytest.approx(0.1))
