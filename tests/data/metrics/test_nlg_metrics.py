"""Scores of texts against what the official scripts printed for the same files, and by hand for a few words."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_hf.core.errors import ConfigError, DataError
from lora_hf.data.metrics import requirements
from lora_hf.data.metrics.captioning import caption_tokens, cider, rouge_l
from lora_hf.data.metrics.nlg import NlgMetric
from lora_hf.data.metrics.texts import score_texts
from lora_hf.data.metrics.translation import mteval_bleu, mteval_nist, multi_bleu, ter
from lora_hf.data.reference_files import read_predictions, read_references
from tests.tolerances import FOUR_DECIMALS, PARITY_FP32

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR, ROUGE_L and CIDEr need Java 8 or newer")


def official(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "dev_scores.json").read_text(encoding="utf-8"))


@pytest.mark.full
@needs_java
def test_a_real_system_scores_what_its_authors_logged(data_dir: Path) -> None:
    """The best one of ten."""
    folder = data_dir / "e2e_eval"
    groups = read_references([folder / "dev_refs.txt"])
    expected = official(folder)
    assert len(expected) == 10
    best = max(expected, key=lambda seed: expected[seed]["BLEU"])
    texts = read_predictions(folder / "dev_system_outputs" / f"ukp_{best}.txt", groups)
    scores = score_texts("e2e_nlg", texts, groups.groups)
    assert not scores.reasons
    assert scores.values == pytest.approx({name: expected[best][name] for name in scores.values}, abs=FOUR_DECIMALS)


def test_bleu_by_hand() -> None:
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples and no quadruple stand in the reference; mteval halves what it has none
    # of: 1/2 of 1/3. The prediction is as long as the reference: no penalty.
    prediction, reference = "the cat sat on the rug", "the cat is on the rug"
    by_hand = math.exp((math.log(5 / 6) + math.log(3 / 5) + math.log(1 / 4) + math.log(1 / 2 / 3)) / 4)
    assert mteval_bleu([prediction], [[reference]]) == pytest.approx(by_hand, abs=PARITY_FP32)
    assert multi_bleu([prediction], [[reference]], tokenized=True) == 0, "multi-bleu.perl smooths nothing"
    assert mteval_bleu(["The cat is on the rug"], [[reference]]) == pytest.approx(1), "case does not count"


def test_nist_by_hand() -> None:
    # Two references of 2 words: 4 words in all. "a" stands twice: log2(4/2) = 1; "b" and "c" once: log2(4/1) = 2.
    # Of "a b" both words match: (1 + 2) / 2. The pair "a b" follows one of two "a": log2(2/1) = 1, over one pair.
    # The prediction is as long as the mean reference: no penalty. There are no longer n-grams.
    assert mteval_nist(["a b"], [["a b", "a c"]]) == pytest.approx(1.5 + 1.0)
    shorter = mteval_nist(["a"], [["a b", "a c"]])
    penalty = math.exp(math.log(0.5) * (math.log(1 / 2) / math.log(1.5)) ** 2)
    assert shorter == pytest.approx(1.0 * penalty)


def test_ter_by_hand() -> None:
    # One word of six is replaced; moving a run of words counts as one edit.
    assert ter(["the cat sat on the rug"], [["the cat is on the rug"]], tokenized=True) == pytest.approx(1 / 6)
    assert ter(["on the rug the cat is"], [["the cat is on the rug"]], tokenized=True) == pytest.approx(1 / 6)


@needs_java
def test_rouge_l_and_cider_of_equal_texts() -> None:
    equal, lower = ["a pub near the river", "cheap food"], ["a pub near the park", "food"]
    references = [[text] for text in equal]
    # The tokens of such texts are their words, for mteval as well.
    assert caption_tokens(lower, references) == (lower, references)
    assert rouge_l(equal, references) == pytest.approx(1)
    # Two texts that share no word: every n-gram of the first is as rare as can be. 2-word texts have no triples: of the
    # four n-gram sizes CIDEr averages, the second text matches two.
    assert cider(equal, references) == pytest.approx(10 * (1 + 2 / 4) / 2)
    for scorer in (mteval_bleu, mteval_nist, rouge_l, cider):  # METEOR: test_java.py, which starts it
        assert scorer(lower, references) < scorer(equal, references), scorer.__name__


@needs_java
def test_the_published_dart_system(data_dir: Path) -> None:
    folder = data_dir / "dart_eval"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the outputs of BART on the DART test set")
    references = read_references([folder])
    predictions = read_predictions(folder / "bart-large_dart.txt", references)
    bleu = multi_bleu(predictions, references.groups, tokenized=True)
    assert bleu == pytest.approx(0.4856, abs=FOUR_DECIMALS), "multi-bleu.perl, as DART's README prints it"


def test_without_java_its_scores_are_none_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.shutil, "which", lambda _: None)
    metric = NlgMetric("e2e_nlg")
    values: Any = metric.compute(predictions=["a b"], references=[["a b", "a c"]])
    assert {name for name, value in values.items() if value is None} == {"METEOR", "ROUGE_L", "CIDEr"}
    assert values["NIST"] == pytest.approx(2.5)
    assert "needs Java 8 or newer" in metric.reasons["METEOR"]
    assert "install it" in metric.reasons["METEOR"]


def test_without_the_extra_every_score_is_none_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda _: None)
    scores = score_texts("dart", ["a"], [["a"]])
    assert set(scores.values.values()) == {None}
    assert "python -m pip install -e '.[nlg]'" in scores.reasons["BLEU"]


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no text metric for the task 'e2e' \(did you mean 'e2e_nlg'\?\)"):
        NlgMetric("e2e")
    with pytest.raises(DataError, match="found 2 predictions and 1 groups"):
        score_texts("dart", ["a", "b"], [["a"]])
    with pytest.raises(DataError, match="prediction 2 has no reference"):
        score_texts("dart", ["a", "b"], [["a"], [" "]])
