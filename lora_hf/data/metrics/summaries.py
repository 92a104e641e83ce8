"""ROUGE as the package `rouge_score`, of the extra `nlg`, computes it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_hf.data.metrics.requirements import package_folder

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the mean F-measure of each kind, with Porter stemming, for the best reference of each text.

    Source: Lin 2004, "ROUGE".
    """
    package_folder("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = [
        scorer.score_multi(list(group), prediction) for prediction, group in zip(predictions, references, strict=True)
    ]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in KINDS}
