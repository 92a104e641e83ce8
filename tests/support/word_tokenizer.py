"""A tokenizer of a hundred words for the models of `small_models`: `w0` to `w95`, and four special tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3
WORDS = [f"w{number}" for number in range(96)]


def word_tokenizer(ends: bool = False, **values: Any) -> PreTrainedTokenizerFast:
    """A tokenizer without a padding token of its own and without `model_max_length`, unless they are given.

    Args:
        ends: whether each text gets an end token.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(tokens | values))
