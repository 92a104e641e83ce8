"""BLEU and NIST as mteval-v13a, BLEU as multi-bleu.perl and as sacrebleu, TER as tercom compute them, and chrF.

BLEU, chrF and TER are sacrebleu's, from the extra `nlg`; without it each function raises a `ScorerError`. No library
has mteval's NIST: nltk's takes the best single reference, mteval clips over all of them. All but NIST, which is in bits
per word, are fractions of 1 (papers often print them times 100).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from lora_hf.data.metrics.requirements import package_folder

References = Sequence[Sequence[str]]
Counts = Counter[tuple[str, ...]]

NIST_ORDER = 5


def mteval_bleu(predictions: Sequence[str], references: References) -> float:
    """BLEU as `mteval-v13a.pl`: its tokens in lower case, up to 4-grams, closest reference length, its smoothing."""
    return _score("BLEU", predictions, references, lowercase=True, tokenize="13a", smooth_method="exp", force=True)


def mteval_nist(predictions: Sequence[str], references: References) -> float:
    """NIST as `mteval-v13a.pl`: its tokens in lower case, up to 5-grams.

    An n-gram is worth `log2(count of its first n-1 words / count of it)` over all references. The length penalty
    compares the number of predicted words with the number of reference words over the mean number of references.

    Source: Doddington 2002, equations 2 and 3; `NIST_ORDER` and the length penalty are the script's.
    """
    package_folder("sacrebleu")
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    candidates = [tokenize(prediction.lower()).split() for prediction in predictions]
    groups = [[tokenize(reference.lower()).split() for reference in group] for group in references]
    counts: Counts = Counter()
    for reference in (reference for group in groups for reference in group):
        counts[()] += len(reference)
        for order in range(1, NIST_ORDER + 1):
            counts.update(_ngrams(reference, order))
    matched, total = [0.0] * NIST_ORDER, [0] * NIST_ORDER
    for candidate, group in zip(candidates, groups, strict=True):
        for i in range(NIST_ORDER):
            allowed: Counts = Counter()
            for reference in group:
                allowed |= _ngrams(reference, i + 1)
            predicted = _ngrams(candidate, i + 1)
            total[i] += predicted.total()
            matched[i] += sum(
                count * math.log2(counts[ngram[:-1]] / counts[ngram]) for ngram, count in (predicted & allowed).items()
            )
    mean_references = sum(map(len, groups)) / max(len(groups), 1)
    penalty = _nist_length_penalty(total[0] * mean_references, counts[()])
    return penalty * sum(value / max(count, 1) for value, count in zip(matched, total, strict=True))


def multi_bleu(predictions: Sequence[str], references: References, tokenized: bool) -> float:
    """BLEU as `multi-bleu.perl -lc` on tokens separated by spaces, or as `multi-bleu-detok.perl -lc` on raw text.

    If a text has fewer references than another, the scripts read empty lines and count them as references of no words.
    Such a reference is the closest in length to a prediction of less than half the length of the others.
    """
    tokenize = "none" if tokenized else "13a"
    return _score(
        "BLEU", predictions, references, " ", lowercase=True, tokenize=tokenize, smooth_method="none", force=True
    )


def ter(predictions: Sequence[str], references: References, tokenized: bool) -> float:
    """TER as tercom 0.7.25: edits to the nearest reference over the mean reference length, not case-sensitive.

    tercom tokenizes raw text (its option -N).

    Source: Snover et al. 2006, "A study of translation edit rate".
    """
    return _score("TER", predictions, references, normalized=not tokenized)


def sacre_bleu(predictions: Sequence[str], references: References) -> float:
    """BLEU as `sacrebleu` computes it by default: 13a tokens, case-sensitive."""
    return _score("BLEU", predictions, references)


def chrf(predictions: Sequence[str], references: References) -> float:
    """chrF2 as `sacrebleu` computes it by default."""
    return _score("CHRF", predictions, references)


def _score(
    metric: str, predictions: Sequence[str], references: References, fill: str | None = None, **settings: Any
) -> float:
    """Returns the score of a metric of sacrebleu as a fraction of 1.

    Args:
        fill: stands for each reference that a text has fewer than another; sacrebleu skips None.
    """
    package_folder("sacrebleu")
    from sacrebleu import metrics

    # The first reference of every text, then the second, and so on.
    columns = list(zip_longest(*references, fillvalue=fill))
    return getattr(metrics, metric)(**settings).corpus_score(list(predictions), columns).score / 100


def _ngrams(words: list[str], order: int) -> Counts:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _nist_length_penalty(length: float, reference_length: float) -> float:
    """Returns 1 from the reference length on, and 0.5 at two thirds of it."""
    if length >= reference_length:
        return 1.0
    if length <= 0:
        return 0.0
    return math.exp(math.log(0.5) * (math.log(length / reference_length) / math.log(1.5)) ** 2)
