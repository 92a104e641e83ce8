"""Exact match and F1 of answers against the definition of the official scripts, worked out by hand."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lora_hf.data.metrics.question_answering import exact_match, f1, normalize_answer, score_answers
from lora_hf.data.metrics.texts import score_texts


def test_normalization() -> None:
    assert normalize_answer(" The  Eiffel-Tower, (an icon)! ") == "eiffeltower icon"
    assert normalize_answer("Theatre of a nation") == "theatre of nation", "articles are whole words"


def test_the_best_reference_counts() -> None:
    assert exact_match("the Broncos.", "Broncos") == 1
    # Shared: denver, broncos; precision 2/3, recall 2/2.
    assert f1("Denver Broncos team", "the Denver Broncos") == pytest.approx(0.8)
    scores = score_answers(["Denver Broncos team", "in 1990"], [["Broncos", "Denver Broncos"], ["1990"]], False)
    assert scores == pytest.approx({"exact_match": 0.0, "f1": (0.8 + 2 / 3) / 2})


def test_no_answer_as_in_squad_2() -> None:
    # Right: no answer; wrong: an answer to a question without one, none to a question with one; "a" normalizes to none.
    scores = score_answers(["", "Rome", "", "Oslo"], [[], [], ["Oslo"], ["Oslo"]], True)
    assert scores == pytest.approx(
        {
            "exact_match": 0.5, "has_answer_exact_match": 0.5, "no_answer_exact_match": 0.5,
            "f1": 0.5, "has_answer_f1": 0.5, "no_answer_f1": 0.5,
        }
    )  # fmt: skip
    assert score_answers(["the"], [["a"]], True)["f1"] == 1, "no words on either side: no answer"
    assert score_answers(["the"], [["a"]], False) == {"exact_match": 1.0, "f1": 0.0}, "SQuAD 1.1 shares no word"


def test_summaries_and_translations() -> None:
    texts = ["The cat sat on the mat.", "Two dogs were running."]
    groups = [["The cat is sitting on the mat.", "A cat sat on a mat."], ["Two dogs ran."]]
    scores = score_texts("rouge_bleu", texts, groups).values
    columns = [["The cat is sitting on the mat.", "Two dogs ran."], ["A cat sat on a mat.", None]]
    assert scores["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(texts, columns).score / 100)  # type: ignore[arg-type]
    assert scores["chrF"] == pytest.approx(sacrebleu.corpus_chrf(texts, columns).score / 100)  # type: ignore[arg-type]
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(rouge.score(each, text)["rougeL"].fmeasure for each in group)
        for text, group in zip(texts, groups, strict=True)
    ]
    assert scores["ROUGE_L"] == pytest.approx(sum(best) / 2)
    assert list(scores) == ["ROUGE_1", "ROUGE_2", "ROUGE_L", "BLEU", "chrF"]
