"""Generated texts scored as the official scripts of their task score them; `nlg.py` wraps this for `evaluate`.

This file does not import `evaluate`, which brings torch in: `score.py` starts in a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from lora_hf.core.errors import ConfigError, DataError, did_you_mean
from lora_hf.data.metrics import captioning, translation
from lora_hf.data.metrics.requirements import ScorerError

METRIC_NAMES: dict[str, tuple[str, ...]] = {
    "e2e_nlg": ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"),
    "dart": ("BLEU", "METEOR", "TER"),
    "web_nlg": ("BLEU", "METEOR", "TER"),
}

_E2E_TOOLS = {
    "BLEU": "mteval-v13a",
    "NIST": "mteval-v13a",
    "METEOR": "METEOR 1.5 on PTB tokens",
    "ROUGE_L": "pycocoevalcap on PTB tokens",
    "CIDEr": "pycocoevalcap on PTB tokens",
}
_TOKENIZED_TOOLS = {"BLEU": "multi-bleu.perl -lc", "METEOR": "METEOR 1.5", "TER": "tercom"}
_RAW_TOOLS = {"BLEU": "multi-bleu-detok.perl -lc", "METEOR": "METEOR 1.5", "TER": "tercom -N"}


@dataclass(frozen=True)
class TextScores:
    """The values of a task in the order of `METRIC_NAMES`; None where a scorer could not run, and why in `reasons`.

    `tools` names the script whose number each value equals.
    """

    values: dict[str, float | None]
    tools: dict[str, str]
    reasons: dict[str, str]


def score_texts(
    task: str, predictions: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool = False
) -> TextScores:
    """The scores of one system: a prediction and its references for each input.

    BLEU, METEOR, ROUGE_L and TER are fractions of 1. For dart and web_nlg `tokenized` says that spaces already part
    the tokens, as in the sets' own `.lex` files; E2E's scorer always brings its own tokens.

    Raises:
        ConfigError: not a task of generation.
        DataError: no predictions, another number of predictions than of references, or a prediction without one.
    """
    check_task(task)
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"{task}: expected a group of references for each prediction, found {len(predictions)} predictions and "
            f"{len(references)} groups"
        )
    groups = [[reference for reference in group if reference.strip()] for group in references]
    if [] in groups:
        raise DataError(f"{task}: prediction {groups.index([]) + 1} has no reference; give each at least one")
    if task == "e2e_nlg":
        return _run(_e2e_scorers(predictions, groups), _E2E_TOOLS)
    return _run(_triple_scorers(predictions, groups, tokenized), _TOKENIZED_TOOLS if tokenized else _RAW_TOOLS)


def check_task(task: str) -> None:
    """Raises a `ConfigError` where `task` has no scores of texts."""
    if task not in METRIC_NAMES:
        nearest = did_you_mean(task, METRIC_NAMES)
        raise ConfigError(f"no text metric for the task {task!r}{nearest}; known: {', '.join(METRIC_NAMES)}")


def _e2e_scorers(predictions: Sequence[str], references: list[list[str]]) -> dict[str, Callable[[], float]]:
    tokens = cache(lambda: captioning.caption_tokens(predictions, references))
    return {
        "BLEU": lambda: translation.mteval_bleu(predictions, references),
        "NIST": lambda: translation.mteval_nist(predictions, references),
        "METEOR": lambda: captioning.meteor(*tokens()),
        "ROUGE_L": lambda: captioning.rouge_l(*tokens()),
        "CIDEr": lambda: captioning.cider(*tokens()),
    }


def _triple_scorers(
    predictions: Sequence[str], references: list[list[str]], tokenized: bool
) -> dict[str, Callable[[], float]]:
    return {
        "BLEU": lambda: translation.multi_bleu(predictions, references, tokenized),
        "METEOR": lambda: captioning.meteor(predictions, references),
        "TER": lambda: translation.ter(predictions, references, tokenized),
    }


def _run(scorers: dict[str, Callable[[], float]], tools: dict[str, str]) -> TextScores:
    reasons: dict[str, str] = {}
    values = {name: _value(name, scorer, reasons) for name, scorer in scorers.items()}
    return TextScores(values, tools, reasons)


def _value(name: str, scorer: Callable[[], float], reasons: dict[str, str]) -> float | None:
    try:
        return scorer()
    except ScorerError as error:
        reasons[name] = str(error)
        return None
