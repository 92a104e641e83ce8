"""Scores of tags, and of the spans that they mark."""

from __future__ import annotations

from collections.abc import Sequence

Tags = Sequence[Sequence[str]]  # of each word of each row


def score_tags(predictions: Tags, references: Tags, marks_spans: bool) -> dict[str, float]:
    """Returns the accuracy of the tags and, where they mark spans, precision, recall and F1 over all spans.

    A span counts if its first word, last word and type are right (conlleval).
    """
    words = [pair for row in zip(predictions, references, strict=True) for pair in zip(*row, strict=True)]
    accuracy = sum(predicted == right for predicted, right in words) / len(words)
    if not marks_spans:
        return {"accuracy": accuracy}
    found, expected, right = 0, 0, 0
    for predicted_row, reference_row in zip(predictions, references, strict=True):
        predicted_spans, spans = set(spans_of(predicted_row)), set(spans_of(reference_row))
        found += len(predicted_spans)
        expected += len(spans)
        right += len(predicted_spans & spans)
    return {
        "f1": 2 * right / max(found + expected, 1),
        "precision": right / max(found, 1),
        "recall": right / max(expected, 1),
        "accuracy": accuracy,
    }


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns the type, first word and last word of each span of BIO or BIOES tags, found as conlleval does.

    A tag continues the span before it if it is I or E after B or I of the same type. Any other tag but O starts one.
    """
    spans: list[tuple[str, int, int]] = []
    previous = ("O", "")
    for word, tag in enumerate(tags):
        mark, kind = tag[:1], tag[1:].removeprefix("-")
        if mark in ("I", "E") and previous in (("B", kind), ("I", kind)):
            spans[-1] = (kind, spans[-1][1], word)
        elif mark != "O":
            spans.append((kind, word, word))
        previous = (mark, kind)
    return spans
