"""Scores that come from image captioning, as E2E's official scorer takes them: METEOR, ROUGE_L and CIDEr.

All three read Penn Treebank tokens, lower-cased, without punctuation. The formulas are pycocoevalcap's.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_hf.data.metrics.java import running_meteor, tokenize_ptb


def caption_tokens(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Predictions and references as Penn Treebank tokens without punctuation, joined by spaces.

    Raises:
        ScorerError: the tokenizer cannot run.
    """
    lines = tokenize_ptb([*predictions, *(reference for group in references for reference in group)])
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    tokens = (" ".join(token for token in line.split(" ") if token not in PUNCTUATIONS) for line in lines)
    return [next(tokens) for _ in predictions], [[next(tokens) for _ in group] for group in references]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of one system, 0 to 1; see `running_meteor`."""
    with running_meteor() as program:
        return program.score(predictions, references)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean F-measure of the longest common subsequence of tokens, recall weighted by 1.2 squared.

    Source: Lin 2004, "ROUGE", section 3; precision and recall are each of their best reference.
    """
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*_by_number(predictions, references))[0])


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D: ten times the mean cosine of tf-idf weighted n-grams, up to 4, of prediction and reference.

    The weights count in how many groups of references an n-gram stands: of a single group they are all 0, and so is
    the score.

    Source: Vedantam et al. 2015, "CIDEr", equations 1 to 4 and section 7.
    """
    from pycocoevalcap.cider.cider import Cider

    if not any(reference.split() for group in references for reference in group):
        return 0.0  # pycocoevalcap takes the maximum of no counts there
    return float(Cider().compute_score(*_by_number(predictions, references))[0])


def _by_number(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and predictions as pycocoevalcap takes them."""
    return dict(enumerate(map(list, references))), {i: [text] for i, text in enumerate(predictions)}
