"""Encoder-decoder models: a target text for a source, such as a summary or a translation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError, DataError, did_you_mean
from lora_hf.data.tasks.base import TRUNCATED, ModelKind, Task
from lora_hf.data.tasks.generation import TextToText, shown
from lora_hf.data.tasks.sources import Source
from lora_hf.data.tasks.user_texts import encode_texts, encode_truncated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(TextToText):
    """Writes a target for a source, with `prefix` in front of every source."""

    what: ClassVar[str] = "a source text"
    model_kind: ModelKind = "seq2seq-lm"
    prefix: str = ""
    source_lang: str | None = None
    target_lang: str | None = None

    def context(self, prompt: str) -> str:
        return self.prefix + super().context(prompt)

    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return "the end of their sources"

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns the inputs of the encoder, and the target's tokens with its end as `labels`.

        One entry for each target of each row. The model makes the inputs of its decoder from the labels. A source of
        more than `max_length` tokens loses its end.

        Raises:
            DataError: a target of more than `max_length` tokens.
            ConfigError: a language that the tokenizer does not know, or none for the targets where it needs one.
        """
        pairs = self.pairs(rows)
        if not pairs:
            return {name: [] for name in (*tokenizer.model_input_names, "labels", TRUNCATED)}
        known = _languages_of(tokenizer) if getattr(tokenizer, "tgt_lang", "") is None else ()
        if known and self.target_lang is None:  # the tokenizer would take that of the sources, or fail
            raise ConfigError(f"task.target_lang: expected the language of the targets, one of {', '.join(known)}")
        encoded = self._sources([source for source, _ in pairs], tokenizer, max_length)
        with self._languages(tokenizer):
            encoded_targets: Any = encode_texts(tokenizer, text_target=[target for _, target in pairs], verbose=False)
            targets = encoded_targets["input_ids"]
        for (_, target), tokens in zip(pairs, targets, strict=True):
            if len(tokens) > max_length:
                raise DataError(
                    f"{self.name}: a target of {len(tokens)} tokens, its end included; expected at most {max_length} "
                    f"(task.max_length, or the model's own limit): {shown(target)}. Set a greater task.max_length, "
                    "or leave the row out."
                )
        return {**encoded, "labels": targets}

    def prompts(self, contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
        """Returns the tokens of the sources; those of more than `max_length` lose their end, with a warning."""
        encoded = self._sources(contexts, tokenizer, max_length)
        self.warn_truncated(encoded[TRUNCATED], tokenizer, max_length)
        return encoded["input_ids"]

    def _sources(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        with self._languages(tokenizer):
            tokens, truncated = encode_truncated(tokenizer, list(texts), max_length=max_length)
        inputs: dict[str, Any] = {name: tokens[name] for name in tokenizer.model_input_names if name in tokens}
        return inputs | {TRUNCATED: truncated}

    @contextlib.contextmanager
    def _languages(self, tokenizer: Any) -> Iterator[None]:
        """Tells a tokenizer of many languages which two it reads."""
        languages = {"src_lang": self.source_lang, "tgt_lang": self.target_lang}
        chosen = {name: code for name, code in languages.items() if code is not None}
        for name, code in chosen.items():
            _language_token(tokenizer, name, code)  # raises before one of them is set
        before = {name: getattr(tokenizer, name) for name in chosen}
        for name, code in chosen.items():
            setattr(tokenizer, name, code)
        try:
            yield
        finally:
            for name, code in before.items():
                setattr(tokenizer, name, code)

    def first_token(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Returns the token of the target language, with which every text begins; None for other models.

        Raises:
            ConfigError: the tokenizer does not know the language.
        """
        return None if self.target_lang is None else _language_token(tokenizer, "tgt_lang", self.target_lang)


def _language_token(tokenizer: Any, name: str, code: str) -> int:
    """Returns the token of a language that the tokenizer takes as its attribute `name`.

    Raises:
        ConfigError: the tokenizer has no languages, or not this one.
    """
    key = {"src_lang": "source_lang", "tgt_lang": "target_lang"}[name]
    known = _languages_of(tokenizer) if hasattr(tokenizer, name) else {}
    if not known:
        raise ConfigError(f"task.{key}={code}: the tokenizer of this model has no tokens for languages; leave it out")
    token = known.get(code, known.get(f"__{code}__"))  # SeamlessM4T and PLBart take `fra` and `__fra__`
    if token is None:
        raise ConfigError(f"task.{key}={code}: expected one of {', '.join(known)}{did_you_mean(code, known)}")
    return token


def _languages_of(tokenizer: Any) -> dict[str, int]:
    """Returns the tokens of the languages by their codes, or for a tokenizer without such a table all added tokens.

    A code may also be an ordinary word of the vocabulary: M2M100 writes the language `fr` as the token `__fr__`.
    """
    known = getattr(tokenizer, "lang_code_to_id", None) or tokenizer.get_added_vocab()
    others = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.special_tokens_map.values()}
    return {code: token for code, token in known.items() if token not in others}


def seq2seq_task(config: TaskConfig, source: Source) -> Task:
    """Returns the task of a checked config."""
    return Seq2Seq(
        name=config.name,
        source=source,
        text_columns=(*(config.text_columns or ()), config.label_column or ""),
        metric="rouge_bleu",
        prefix=config.prefix,
        source_lang=config.source_lang,
        target_lang=config.target_lang,
    )
