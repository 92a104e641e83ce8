"""ROUGE_L and CIDEr as the official E2E scorer computes them: with pycocoevalcap, on Penn Treebank tokens."""

from __future__ import annotations

from collections.abc import Sequence

from lora_hf.data.metrics.java import tokenize_ptb


def caption_tokens(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Returns predictions and references as lower-case Penn Treebank tokens without punctuation, joined by spaces.

    Raises:
        ScorerError: the tokenizer cannot run.
    """
    lines = tokenize_ptb([*predictions, *(reference for group in references for reference in group)])
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    tokens = (" ".join(token for token in line.split(" ") if token not in PUNCTUATIONS) for line in lines)
    return [next(tokens) for _ in predictions], [[next(tokens) for _ in group] for group in references]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean F-measure of the longest common subsequence; precision and recall each take the best reference.

    Source: Lin 2004, "ROUGE", section 3, with beta 1.2.
    """
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*_by_index(predictions, references))[0])


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D: ten times the mean cosine of tf-idf weighted n-grams up to 4 of prediction and references.

    Document frequencies count groups of references, so a single group scores 0.

    Source: Vedantam et al. 2015, "CIDEr", equations 1 to 4 and section 7.
    """
    from pycocoevalcap.cider.cider import Cider

    if not any(reference.split() for group in references for reference in group):
        return 0.0  # pycocoevalcap fails on references without tokens
    return float(Cider().compute_score(*_by_index(predictions, references))[0])


def _by_index(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Returns references and predictions in pycocoevalcap's form."""
    return dict(enumerate(map(list, references))), {index: [text] for index, text in enumerate(predictions)}
