"""Exact match and F1 of answers, as the official scripts of SQuAD 1.1 and 2.0 compute them, as fractions of 1.

Source: Rajpurkar et al. 2016 (evaluate-v1.1.py) and 2018 (evaluate-v2.0.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Returns the text in lower case, without punctuation, articles and repeated white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str, no_answer: bool = False) -> float:
    return float(normalize_answer(prediction) == normalize_answer(reference))


def f1(prediction: str, reference: str, no_answer: bool = False) -> float:
    """The F1 of the words that both answers share; with `no_answer` two answers without words share everything."""
    found, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if no_answer and not (found and expected):
        return float(found == expected)
    shared = (Counter(found) & Counter(expected)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def score_answers(predictions: Sequence[str], references: Sequence[Sequence[str]], no_answer: bool) -> dict[str, float]:
    """Returns `exact_match` and `f1`, each the mean over the questions of the best reference.

    Args:
        references: the right answers of each question; none if there is no answer.
        no_answer: score as SQuAD 2.0: an empty prediction is right where there is no answer. Adds the scores of the
            questions with and without an answer.
    """
    groups = [_references(group, no_answer) for group in references]
    scores: dict[str, float] = {}
    for name, metric in (("exact_match", exact_match), ("f1", f1)):
        values = [
            max(metric(prediction, reference, no_answer) for reference in group)
            for prediction, group in zip(predictions, groups, strict=True)
        ]
        scores[name] = sum(values) / len(values)
        if no_answer:
            for kind, wanted in (("has_answer", True), ("no_answer", False)):
                part = [value for value, group in zip(values, groups, strict=True) if (group != [""]) == wanted]
                if part:
                    scores[f"{kind}_{name}"] = sum(part) / len(part)
    return scores


def _references(group: Sequence[str], no_answer: bool) -> list[str]:
    if not no_answer:
        return list(group)
    return [text for text in group if normalize_answer(text)] or [""]
