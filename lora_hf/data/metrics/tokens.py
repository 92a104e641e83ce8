"""Scores of tags, with `seqeval` for the spans that they mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Tags = Sequence[Sequence[str]]  # of each word of each row


def score_tags(predictions: Tags, references: Tags, marks_spans: bool) -> dict[str, float]:
    """Returns the accuracy of the tags and, where they mark spans, precision, recall and F1 over all spans.

    A span counts if its first word, last word and type are right (conlleval).
    """
    words = [pair for row in zip(predictions, references, strict=True) for pair in zip(*row, strict=True)]
    accuracy = sum(predicted == right for predicted, right in words) / len(words)
    if not marks_spans:
        return {"accuracy": accuracy}
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    scores: Any = precision_recall_fscore_support(
        [list(row) for row in references],
        [list(row) for row in predictions],
        average="micro",
        zero_division=0,  # pyright: ignore[reportArgumentType]: a number or a word
    )
    precision, recall, f1 = (float(score) for score in scores[:3])
    return {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy}


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns the type, first word and last word of each span."""
    from seqeval.metrics.sequence_labeling import get_entities

    return get_entities(list(tags))
