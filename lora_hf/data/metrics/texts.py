"""Scores of generated texts, equal to those of the official scripts of each task.

`nlg.py` wraps them for `evaluate`; this file does not import it, because it imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from lora_hf.core.errors import ConfigError, DataError, did_you_mean
from lora_hf.data.metrics import captioning, java, summaries, translation
from lora_hf.data.metrics.requirements import ScorerError

Scorers = dict[str, tuple[str, Callable[[], float]]]  # by metric: the official script, and a function for its score


@dataclass(frozen=True)
class TextScores:
    """The scores of a task by metric. A score is None if its scorer cannot run.

    `tools` names the official script that gives the same number, `reasons` says why a score is None.
    """

    values: dict[str, float | None]
    tools: dict[str, str]
    reasons: dict[str, str]


def score_texts(
    task: str, predictions: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool = False
) -> TextScores:
    """Scores the texts of one system.

    All but NIST and CIDEr are fractions of 1.

    Args:
        references: one or more for each prediction.
        tokenized: of dart and web_nlg: spaces separate the tokens, as in the data sets' `.lex` files. E2E's scorer
            always tokenizes.

    Raises:
        ConfigError: not a generation task.
        DataError: no predictions, or not one group of references for each.
    """
    check_task(task)
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"{task}: expected a group of references for each prediction, found {len(predictions)} predictions and "
            f"{len(references)} groups"
        )
    groups = [[reference for reference in group if reference.strip()] for group in references]
    if [] in groups:
        raise DataError(f"{task}: prediction {groups.index([]) + 1} has no reference; add at least one")
    scorers = _SCORERS[task](predictions, groups, tokenized)
    reasons: dict[str, str] = {}

    def score(name: str) -> float | None:
        try:
            return scorers[name][1]()
        except ScorerError as error:
            reasons[name] = str(error)
            return None

    tools = {name: tool for name, (tool, _) in scorers.items()}
    return TextScores({name: score(name) for name in scorers}, tools, reasons)


def check_task(task: str) -> None:
    """Raises a `ConfigError` if `task` has no text metrics."""
    if task not in _SCORERS:
        nearest = did_you_mean(task, _SCORERS)
        raise ConfigError(f"no text metric for the task {task!r}{nearest}; known: {', '.join(_SCORERS)}")


def _e2e_scorers(predictions: Sequence[str], references: list[list[str]], tokenized: bool) -> Scorers:
    tokens = cache(lambda: captioning.caption_tokens(predictions, references))
    return {
        "BLEU": ("mteval-v13a", lambda: translation.mteval_bleu(predictions, references)),
        "NIST": ("mteval-v13a", lambda: translation.mteval_nist(predictions, references)),
        "METEOR": ("METEOR 1.5 on PTB tokens", lambda: java.meteor(*tokens())),
        "ROUGE_L": ("pycocoevalcap on PTB tokens", lambda: captioning.rouge_l(*tokens())),
        "CIDEr": ("pycocoevalcap on PTB tokens", lambda: captioning.cider(*tokens())),
    }


def _seq2seq_scorers(predictions: Sequence[str], references: list[list[str]], tokenized: bool) -> Scorers:
    rouge = cache(lambda: summaries.rouge(predictions, references))
    return {
        "ROUGE_1": ("rouge_score with stemming", lambda: rouge()["rouge1"]),
        "ROUGE_2": ("rouge_score with stemming", lambda: rouge()["rouge2"]),
        "ROUGE_L": ("rouge_score with stemming", lambda: rouge()["rougeL"]),
        "BLEU": ("sacrebleu", lambda: translation.sacre_bleu(predictions, references)),
        "chrF": ("sacrebleu", lambda: translation.chrf(predictions, references)),
    }


def _triple_scorers(predictions: Sequence[str], references: list[list[str]], tokenized: bool) -> Scorers:
    bleu, ter = ("multi-bleu.perl -lc", "tercom") if tokenized else ("multi-bleu-detok.perl -lc", "tercom -N")
    return {
        "BLEU": (bleu, lambda: translation.multi_bleu(predictions, references, tokenized)),
        "METEOR": ("METEOR 1.5", lambda: java.meteor(predictions, references)),
        "TER": (ter, lambda: translation.ter(predictions, references, tokenized)),
    }


_SCORERS: dict[str, Callable[[Sequence[str], list[list[str]], bool], Scorers]] = {
    "e2e_nlg": _e2e_scorers,
    "dart": _triple_scorers,
    "web_nlg": _triple_scorers,
    "rouge_bleu": _seq2seq_scorers,  # custom tasks of encoder-decoders
}
