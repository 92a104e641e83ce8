"""The texts of users as tokens: a special token that a user has written, such as `[SEP]`, is text like any other."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

SHOWN_ROWS = 5


def encode_texts(tokenizer: PreTrainedTokenizerBase, *texts: Any, **options: Any) -> BatchEncoding:
    """Calls the tokenizer so that it reads special tokens in a text as text, if it can; see `honored_tokens`.

    Args:
        texts, options: what the tokenizer takes.
    """
    if _can_split(tokenizer):
        options["split_special_tokens"] = True
    return tokenizer(*texts, **options)


def encode_truncated(
    tokenizer: PreTrainedTokenizerBase, *texts: Any, max_length: int
) -> tuple[BatchEncoding, list[bool]]:
    """Returns the texts as `encode_texts`, each of at most `max_length` tokens, and which of them were truncated.

    Of two texts the longer one is truncated first.
    """
    encoded = encode_texts(tokenizer, *texts, truncation=True, max_length=max_length)
    if encoded.encodings is not None:
        return encoded, [bool(encoding.overflowing) for encoding in encoded.encodings]
    # A tokenizer in Python, such as Marian's, does not say.
    whole: Any = encode_texts(tokenizer, *texts, verbose=False)
    return encoded, [len(ids) > max_length for ids in whole["input_ids"]]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the ids of the tokenizer's special tokens, added ones included, by their texts."""
    special: dict[str, Any] = {
        str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens
    }
    added = tokenizer.added_tokens_decoder
    return special | {token.content: number for number, token in added.items() if token.special}


def honored_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that the tokenizer honors in a text even so: most often because a word of its is spelled so.

    The token for unknown words is none of them: it says no more than that a word is unknown.
    """
    special = special_tokens(tokenizer)
    special.pop(str(tokenizer.unk_token), None)
    if not special:
        return []
    encoded: Any = encode_texts(tokenizer, [f"a {token} a" for token in special], add_special_tokens=False)
    return [token for (token, number), ids in zip(special.items(), encoded["input_ids"], strict=True) if number in ids]


def warn_honored_tokens(name: str, texts: Sequence[str], tokens: Sequence[str]) -> None:
    """Logs which texts hold one of `tokens`, the `honored_tokens` of the tokenizer."""
    if not tokens:
        return
    pattern = re.compile("|".join(map(re.escape, tokens)))
    found = {row: match[0] for row, text in enumerate(texts) if (match := pattern.search(text))}
    if found:
        rows = list(found)
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        _log.warning(
            "%s: %d of %d texts hold a special token, such as %s, which this tokenizer cannot read as text: the model "
            "takes it for a token of its own. Rows (counting from 0): %s%s",
            name, len(rows), len(texts), found[rows[0]], ", ".join(map(str, rows[:SHOWN_ROWS])), more,
        )  # fmt: skip


def _can_split(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.is_fast:
        return True
    # One in Python then also splits the added tokens that are not special.
    return all(token.special for token in tokenizer.added_tokens_decoder.values())
