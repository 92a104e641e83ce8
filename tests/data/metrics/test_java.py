"""The Java programs behind METEOR and the PTB tokens: their output, and that they always end."""

from __future__ import annotations

import shutil
import socket
from typing import Any

import pytest

from lora_hf.data.metrics.java import meteor, tokenize_ptb
from lora_hf.data.metrics.nlg import NlgMetric
from lora_hf.data.metrics.requirements import ScorerError

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java 8 or newer")


def test_ptb_tokens_of_every_text_on_one_line() -> None:
    texts = ["", "The Vaults isn't cheap.", "a café\u2028on\ttwo\r\nlines", "."]
    assert tokenize_ptb(texts) == ["", "the vaults is n't cheap .", "a café on two lines", "."]


@pytest.mark.full
def test_meteor_and_every_other_score_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    texts, references = ["", "a cheap pub"], [["a pub"], ["food", "a cheap pub"]]
    score = meteor(texts, references)
    assert 0.5 < score < 1, "an empty text has no match, the other one matches its best reference"
    values: Any = NlgMetric("web_nlg", tokenized=True).compute(predictions=["", "a cheap bar"], references=references)
    assert 0 < values["METEOR"] < score, "a word less matches"
    # Two words are missing and one is another: 3 edits. The references have 2 and, in the mean, (1 + 3) / 2 words.
    assert values["TER"] == pytest.approx(3 / 4)


def test_a_program_is_stopped_after_its_time_limit() -> None:
    with pytest.raises(ScorerError, match=r"the PTB tokenizer was stopped after 0\.01 seconds"):
        tokenize_ptb(["a"], time_limit=0.01)
    with pytest.raises(ScorerError, match=r"METEOR was stopped after 0\.01 seconds"):
        meteor(["a"], [["a"]], time_limit=0.01)
