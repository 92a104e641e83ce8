"""The languages of tokenizers that know several: each family writes the token of a language in its own way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from transformers import MBart50Tokenizer, MBartTokenizer, NllbTokenizer, SeamlessM4TTokenizer

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.registry import task_of
from lora_hf.data.tasks.seq2seq import Seq2Seq
from tests.support.word_tokenizer import word_tokenizer

ROWS = {"source": ["a b"], "target": ["b"]}
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
WORD = "xx"  # a word of every vocabulary, and no language
WORDS = ("▁", "a", "b", WORD)


class Family(NamedTuple):
    """A tokenizer, the codes of two languages that it knows, and their tokens."""

    build: Callable[[Path], Any]
    source: str
    target: str
    tokens: tuple[str, str]


def _m2m_100(folder: Path) -> Any:
    pieces = pytest.importorskip("sentencepiece", reason="M2M100Tokenizer needs sentencepiece, which is not installed")
    from transformers import M2M100Tokenizer

    sentences = iter([f"{WORD} a b"] * 20)
    pieces.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(folder / "spm"), vocab_size=20, hard_vocab_limit=False
    )
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model"))


def _seamless(_: Path) -> Any:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    return SeamlessM4TTokenizer(vocab=vocabulary, additional_special_tokens=["__eng__", "__fra__"])


def _nllb(_: Path) -> Any:
    return NllbTokenizer(vocab={word: number for number, word in enumerate([*SPECIAL, *WORDS])})


def _mbart(_: Path) -> Any:
    return MBartTokenizer(vocab=[(word, -1.0) for word in (*SPECIAL, *WORDS, "en_XX", "fr_XX")])


def _mbart50(_: Path) -> Any:
    return MBart50Tokenizer(vocab=[(word, -1.0) for word in (*SPECIAL, *WORDS, "en_XX", "fr_XX")])


FAMILIES = {
    "nllb": Family(_nllb, "eng_Latn", "fra_Latn", ("eng_Latn", "fra_Latn")),
    "mbart": Family(_mbart, "en_XX", "fr_XX", ("en_XX", "fr_XX")),
    "mbart50": Family(_mbart50, "en_XX", "fr_XX", ("en_XX", "fr_XX")),
    "seamless": Family(_seamless, "eng", "fra", ("__eng__", "__fra__")),
    "m2m_100": Family(_m2m_100, "en", "fr", ("__en__", "__fr__")),
}


def translation(source: str | None, target: str | None) -> Seq2Seq:
    config = TaskConfig("translation", kind="seq2seq", source_lang=source, target_lang=target)
    return cast(Seq2Seq, task_of(config))


@pytest.fixture(params=FAMILIES.values(), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def tokenizer(family: Family, tmp_path: Path) -> Any:
    return family.build(tmp_path)


def test_texts_begin_with_the_token_of_their_language(family: Family, tokenizer: Any) -> None:
    source, target = (tokenizer.convert_tokens_to_ids(token) for token in family.tokens)
    assert len({source, target, tokenizer.unk_token_id}) == 3
    before = (tokenizer.src_lang, tokenizer.tgt_lang)
    # The other way around as well: one of the two languages may be the tokenizer's own.
    for codes, ids in (
        ((family.source, family.target), (source, target)),
        ((family.target, family.source), (target, source)),
    ):
        task = translation(*codes)
        encoded = task.encode(ROWS, tokenizer, 16)
        assert task.first_token(tokenizer) == ids[1]
        assert ids[0] in encoded["input_ids"][0]
        assert ids[1] in encoded["labels"][0]
        assert (tokenizer.src_lang, tokenizer.tgt_lang) == before


@pytest.mark.parametrize("wrong", [WORD, "zz_ZZ", "</s>", ""])
def test_a_language_that_the_tokenizer_does_not_know(wrong: str, family: Family, tokenizer: Any) -> None:
    before = (tokenizer.src_lang, tokenizer.tgt_lang)
    for key, task in (
        ("task.target_lang", translation(family.target, wrong)),
        ("task.source_lang", translation(wrong, family.target)),
    ):
        with pytest.raises(ConfigError) as error:
            task.encode(ROWS, tokenizer, 16)
        assert f"{key}={wrong}: expected one of" in str(error.value)
        assert family.target in str(error.value)
        assert (tokenizer.src_lang, tokenizer.tgt_lang) == before
    with pytest.raises(ConfigError, match=r"task\.target_lang"):
        translation(None, wrong).first_token(tokenizer)


def test_the_language_of_the_targets_is_not_guessed(family: Family, tokenizer: Any) -> None:
    task = translation(family.source, None)
    if tokenizer.tgt_lang is not None:
        assert tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang) in task.encode(ROWS, tokenizer, 16)["labels"][0]
        return
    with pytest.raises(ConfigError, match=rf"task\.target_lang: expected the language .*{family.target}"):
        task.encode(ROWS, tokenizer, 16)


def test_a_tokenizer_without_languages() -> None:
    tokenizer = word_tokenizer(ends=True)
    assert translation(None, None).first_token(tokenizer) is None
    for codes in ((None, "w1"), ("w1", None)):
        with pytest.raises(ConfigError, match="no tokens for languages; leave it out"):
            translation(*codes).encode(ROWS, tokenizer, 16)
