"""What tells more about a classifier than its metrics: scores by class, confusions, calibration, confident mistakes.

Everything is plain values, as records and `--json` hold them. Scores by class are scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_hf.core.formatting import cut

BINS = 15
SHOWN = 20  # mistakes
LONGEST_TEXT = 300  # characters of a text that are kept with a mistake


def evaluate_classes(labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Returns the evaluation of class ids `(rows,)` and probabilities `(rows, classes)`; the largest one decides."""
    from sklearn.metrics import confusion_matrix

    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    mistakes = _most_confident(np.flatnonzero(predictions != labels), confidence)
    return {
        "classes": _by_class(_indicators(labels, len(names)), _indicators(predictions, len(names)), names),
        "confusion": confusion_matrix(labels, predictions, labels=range(len(names))).tolist(),
        "calibration": calibration(predictions == labels, confidence),
        "mistakes": [
            {
                "row": row,
                "label": names[labels[row]],
                "prediction": names[predictions[row]],
                "confidence": round(float(confidence[row]), 6),
            }
            for row in mistakes
        ],
    }


def evaluate_label_sets(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Returns the evaluation of 0/1 `labels` and `probabilities`, both `(rows, labels)`.

    A mistake is one wrong label of a row; its confidence is the probability of what was predicted. The calibration is
    that of the probabilities of all labels.
    """
    from sklearn.metrics import multilabel_confusion_matrix

    predictions = (probabilities >= thresholds).astype(int)
    confidence = np.where(predictions == 1, probabilities, 1 - probabilities)
    wrong = _most_confident(np.flatnonzero(predictions != labels), confidence.reshape(-1))
    classes = _by_class(labels, predictions, names)
    confusion = multilabel_confusion_matrix(labels, predictions)
    return {
        "classes": {name: {**classes[name], "threshold": float(t)} for name, t in zip(names, thresholds, strict=True)},
        "confusion": {name: counts.tolist() for name, counts in zip(names, confusion, strict=True)},
        "calibration": calibration(labels.reshape(-1) == 1, probabilities.reshape(-1)),
        "mistakes": [
            {
                "row": row,
                "label": names[index] if labels[row, index] else f"not {names[index]}",
                "prediction": names[index] if predictions[row, index] else f"not {names[index]}",
                "confidence": round(float(confidence[row, index]), 6),
            }
            for row, index in (divmod(cell, len(names)) for cell in wrong)
        ],
    }


def evaluate_scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Returns the evaluation of a regression's scores, both `(rows,)`: the errors, and the rows with the largest."""
    errors = predictions.astype(np.float64) - labels
    largest = np.argsort(-np.abs(errors), kind="stable")[:SHOWN].tolist()
    return {
        "errors": {
            "mean_absolute_error": float(np.abs(errors).mean()),
            "root_mean_squared_error": float(np.sqrt((errors**2).mean())),
        },
        "mistakes": [
            {"row": row, "label": round(float(labels[row]), 6), "prediction": round(float(predictions[row]), 6)}
            for row in largest
        ],
    }


def calibration(correct: np.ndarray, confidence: np.ndarray) -> dict[str, Any]:
    """Returns the expected calibration error and its bins, for `(n,)` outcomes and the probabilities given to them.

    Bin i holds the probabilities in (i/15, (i+1)/15], the first one also 0. The error is the mean over the outcomes of
    the distance between their bin's mean probability and its share of correct ones.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.searchsorted(edges[1:-1], confidence)
    counts, sums, hits = (np.bincount(bins, weights, BINS) for weights in (None, confidence, correct))
    filled = [
        {
            "from": float(edges[index]),
            "to": float(edges[index + 1]),
            "count": int(counts[index]),
            "confidence": float(sums[index] / counts[index]),
            "accuracy": float(hits[index] / counts[index]),
        }
        for index in np.flatnonzero(counts)
    ]
    return {"ece": float(np.abs(sums - hits).sum() / len(confidence)), "bins": filled}


def with_texts(evaluation: dict[str, Any], columns: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns the evaluation with the texts of each mistake, those that are long cut."""
    mistakes = [
        {**mistake, "texts": {name: cut(str(texts[mistake["row"]]), LONGEST_TEXT) for name, texts in columns.items()}}
        for mistake in evaluation["mistakes"]
    ]
    return {**evaluation, "mistakes": mistakes}


def never_predicted(evaluation: dict[str, Any]) -> list[str]:
    """Returns a warning for each class that some rows have and no prediction names."""
    return [
        f"the model never predicts {name!r}, the label of {scores['support']} rows; train.class_weights=balanced gives "
        "rare classes more weight"
        for name, scores in evaluation.get("classes", {}).items()
        if scores["support"] and not scores["predicted"]
    ]


def _by_class(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    from sklearn.metrics import precision_recall_fscore_support

    undefined: Any = 0  # scikit-learn's annotations know only its default, a text
    scores = precision_recall_fscore_support(labels, predictions, average=None, zero_division=undefined)
    columns: Any = (names, *scores, predictions.sum(axis=0))
    return {
        name: {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
            "predicted": int(predicted),
        }
        for name, precision, recall, f1, support, predicted in zip(*columns, strict=True)
    }


def _indicators(classes: np.ndarray, count: int) -> np.ndarray:
    return (classes[:, None] == np.arange(count)).astype(int)


def _most_confident(wrong: np.ndarray, confidence: np.ndarray) -> list[int]:
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN].tolist()
