"""Logits processors of `Generator`."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

from lora_hf.core.errors import TrainingError


class FiniteLogits(LogitsProcessor):
    """Raises a TrainingError for logits that are NaN or infinite: decoding would go on, with any token."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.amax(-1).isfinite().all():  # -inf may mask single tokens
            raise TrainingError(
                "the logits of a generated token are not finite; the model has diverged: train with a lower learning "
                "rate, or check the adapter and its base for damage"
            )
        return scores


class NoRepeatedNGram(LogitsProcessor):
    """Bans n-grams that the generated text already contains, as the decoder of the LoRA paper does.

    transformers' own processor also counts the prompt and the padding: `customer rating : 5 out of 5` in the prompt
    would keep the text from saying `5 out of 5`.
    """

    def __init__(self, size: int, width: int) -> None:
        self.processor, self.width = NoRepeatNGramLogitsProcessor(size), width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.processor(input_ids[:, self.width :], scores)  # type: ignore[arg-type]
