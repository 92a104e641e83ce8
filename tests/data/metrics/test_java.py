"""The Java programs behind METEOR and the PTB tokens: their output, and that they always end."""

from __future__ import annotations

import shutil
import socket
from contextlib import nullcontext
from typing import Any

import pytest

from lora_hf.data.metrics import captioning
from lora_hf.data.metrics.java import running_meteor, tokenize_ptb
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
    with running_meteor() as meteor:
        # Empty texts, and its own separator in a text.
        assert meteor.score(["", "a ||| pub"], [["a pub"], ["b", "a pub"]]) == pytest.approx(
            meteor.score(["", "a pub"], [["a pub"], ["b", "a pub"]])
        )
        assert meteor.score(["a cheap pub"], [["a cheap pub", "food"]]) == pytest.approx(1)
        assert meteor.score(["a cheap bar"], [["a cheap pub", "food"]]) < 0.9
        monkeypatch.setattr(captioning, "running_meteor", lambda: nullcontext(meteor))  # it takes seconds to start
        values: Any = NlgMetric("web_nlg", tokenized=True).compute(predictions=["a b"], references=[["a b"]])
    assert values["TER"] == 0
    assert values["METEOR"] == pytest.approx(1)


def test_a_program_is_stopped_after_its_time_limit() -> None:
    with pytest.raises(ScorerError, match=r"the PTB tokenizer was stopped after 0\.01 seconds"):
        tokenize_ptb(["a"], time_limit=0.01)
    with pytest.raises(ScorerError, match=r"METEOR was stopped after 0\.01 seconds"), running_meteor(0.01) as meteor:
        meteor.score(["a"], [["a"]])


def test_the_process_ends_when_the_caller_fails() -> None:
    with pytest.raises(RuntimeError, match="of the caller"), running_meteor() as meteor:
        raise RuntimeError("of the caller")
    assert meteor._process.returncode is not None, "it was waited for"
