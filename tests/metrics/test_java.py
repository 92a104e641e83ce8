"""The Java programs behind METEOR and the PTB tokens: what they answer, and that they always end."""

from __future__ import annotations

import shutil
import time

import pytest

from lora_hf.metrics.java import running_meteor, tokenize_ptb
from lora_hf.metrics.requirements import ScorerError

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java 8 or newer")


def test_every_text_is_one_line_of_tokens() -> None:
    texts = ["", "The Vaults isn't cheap.", "a café\u2028on\ttwo\r\nlines", "."]
    assert tokenize_ptb(texts) == ["", "the vaults is n't cheap .", "a café on two lines", "."]


def test_meteor_takes_empty_texts_and_its_own_separator() -> None:
    with running_meteor() as meteor:
        assert meteor.score(["", "a ||| pub"], [["a pub"], ["b", "a pub"]]) == pytest.approx(
            meteor.score(["", "a pub"], [["a pub"], ["b", "a pub"]])
        )
        assert meteor.score(["a cheap pub"], [["a cheap pub", "food"]]) == pytest.approx(1)
        assert meteor.score(["a cheap bar"], [["a cheap pub", "food"]]) < 0.9


def test_a_program_that_takes_too_long_is_ended() -> None:
    begin = time.monotonic()
    with pytest.raises(ScorerError, match=r"the PTB tokenizer was stopped after 0\.01 seconds"):
        tokenize_ptb(["a"], time_limit=0.01)
    with pytest.raises(ScorerError, match=r"METEOR was stopped after 0\.2 seconds"), running_meteor(0.2) as meteor:
        meteor.score(["a"], [["a"]])
    assert time.monotonic() - begin < 60


def test_no_process_is_left_when_the_caller_fails() -> None:
    with pytest.raises(RuntimeError, match="of the caller"), running_meteor() as meteor:
        raise RuntimeError("of the caller")
    assert meteor._process.returncode is not None, "it was waited for"
