"""Pads rows into batches for each kind of model, and selects the outputs that an evaluation keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_hf.data.tasks.base import ModelKind
from lora_hf.lora.host_batch import keep_on_host
from lora_hf.lora.unpadding import is_unpadded
from lora_hf.models.align import padding_side
from lora_hf.training.trainer import completion_loss, stack_places, target_loss

COLLATORS: dict[ModelKind, Callable[[PreTrainedTokenizerBase, PreTrainedModel], Any]] = {
    "sequence-classification": lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
    "causal-lm": lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer),
    "token-classification": lambda tokenizer, model: DataCollatorForTokenClassification(tokenizer),
    "question-answering": lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
    # The model makes the inputs of its decoder from the labels, which label smoothing takes away from it.
    "seq2seq-lm": lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer, model),
}

# What an evaluation keeps of the outputs of a batch, where that is not their logits.
EVALUATION_OUTPUTS: dict[ModelKind, Callable[..., torch.Tensor]] = {
    "causal-lm": completion_loss,
    "question-answering": stack_places,
    "seq2seq-lm": target_loss,
}


def padding_collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: ModelKind) -> Any:
    """Returns a collator that pads on the base's side. `tokenizer` keeps its own side, which is saved with it."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = padding_side(model)
    collate = COLLATORS[kind](tokenizer, model)
    return keep_on_host(collate) if is_unpadded(model) else collate
