"""How rows become the batches of a training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.data.tasks.base import ModelKind
from lora_hf.models.align import padding_side

COLLATORS: dict[ModelKind, Callable[[PreTrainedTokenizerBase], Any]] = {
    "sequence-classification": DataCollatorWithPadding,
    "causal-lm": DataCollatorForSeq2Seq,
}


def padding_collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: ModelKind) -> Any:
    """Returns what pads a batch on the base's side; `tokenizer` keeps its own, with which it is saved."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = padding_side(model)
    return COLLATORS[kind](tokenizer)
