"""What a tokenizer does, as a hash: two tokenizers of one identity turn every text into the same tokens.

The hash is of what it knows and of what it answers, not of its files: another place, another class that wraps it or a
newer library that writes it otherwise changes nothing. The padding token is no part of it, as padding is masked, and
neither is `model_max_length`, which `align_tokenizer` sets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

SAMPLES = 2000  # words of the vocabulary that are encoded

# Case, accents, numbers, punctuation, white space, scripts, symbols: what normalizers and pre-tokenizers differ in.
_PROBES = (
    "The Quick brown fox can't JUMP over 12,345.67 lazy dogs -- isn't it?",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcber stra\u00dfe \u0130stanbul \u1ed1m ki\u1ec3m tra",
    "  two  spaces, a\ttab,\n a line\r\nand an end  ",
    "https://example.org/a_b?c=d&e=1#f user@mail.com C++ x**2 {k: [v]} <tag/> ...!!!",
    "\u201cquoted\u201d \u2014 3\u00d74",
    "\u4e2d\u6587\u5206\u8bcd \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600 \U0001f44d\U0001f3fd \ufb01 \uff21\uff22 \u00bd \u200bzero\u00a0width \u00ad",
)

# Of the tokenizers seen so far, by all that decides what one of transformers answers: each save needs the same again.
_digests: dict[tuple[Any, ...], str] = {}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> dict[str, str]:
    """`name`, by default the one that the tokenizer was loaded by, and `sha256`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        sha256 = _digest(tokenizer)  # the code of another class may give other answers the next time
    else:
        rules = hashlib.sha256(backend.to_str().encode()).digest()
        special = (str(tokenizer.special_tokens_map), tokenizer.split_special_tokens)
        state = (type(tokenizer), rules, *special, tokenizer.truncation_side)
        if state not in _digests:
            _digests[state] = _digest(tokenizer)
        sha256 = _digests[state]
    return {"name": name or tokenizer.name_or_path, "sha256": sha256}


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    step = max(1, len(vocabulary) // SAMPLES)
    texts = [*_PROBES, *(word for word, _ in vocabulary[::step])]
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
    known = [vocabulary, _pieces(tokenizer), sorted(roles.items()), tokenizer.truncation_side]
    answers = [_ids(tokenizer, texts), _ids(tokenizer, texts[:1], texts[1:2])]
    return hashlib.sha256(json.dumps([known, answers]).encode()).hexdigest()


def _ids(tokenizer: PreTrainedTokenizerBase, *texts: Sequence[str]) -> list[list[int]]:
    columns: Any = [list(column) for column in texts]
    # verbose=False: a probe may be longer than a small model reads.
    return tokenizer(*columns, padding=False, truncation=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The merges of a BPE in order, or the scored words of a Unigram; otherwise the vocabulary says it all."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    model = json.loads(backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    return merges or (model["vocab"] if isinstance(model.get("vocab"), list) else [])
