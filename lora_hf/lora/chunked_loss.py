"""A causal model whose head is computed only where a token has a label.

Two thirds of an E2E row have none, and with a vocabulary of 50,000 the logits of a batch are its largest tensor by far.
After `score_labels_only(model)` a call with labels gives their loss and each row's share of it, and never holds more
logits than a chunk of tokens; a call without labels, as in generation, is what it was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from lora_hf.core.errors import TrainingError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.lora.kernels.cross_entropy import token_losses


@dataclass
class CompletionOutput(ModelOutput):
    """The loss in nats per labelled token, and `(rows, 2)`: each row's nll summed over its labels, and their number."""

    loss: torch.Tensor | None = None
    rows: torch.Tensor | None = None


def enable_chunked_loss(model: PreTrainedModel, smoothing: float = 0.0) -> bool:
    """Makes calls with labels skip all other logits; whether this model can be served so.

    Its head must be frozen: the loss gives the head's weight no gradient.

    Args:
        smoothing: of the training loss (`kernels.cross_entropy.token_losses`); an evaluation's loss is the plain nll.
    """
    head = model.get_output_embeddings()
    if getattr(model.forward, "func", None) is _forward:
        return True
    if model.config.model_type not in ("gpt2", "llama") or not isinstance(head, nn.Linear):
        return False
    if head.bias is not None or head.weight.requires_grad:
        return False
    model.forward = functools.wraps(model.forward)(functools.partial(_forward, model, model.forward, smoothing))
    return True


def _forward(
    model: Any,
    plain: Any,
    smoothing: float,
    *inputs: Any,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **named: Any,
) -> Any:
    """`num_items_in_batch`: what the sum of losses is divided by, one number or one for each row."""
    if labels is None:
        return plain(*inputs, **named)
    hidden = model.base_model(*inputs, **named)[0]
    targets = labels[:, 1:]
    row, place = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    weight = model.get_output_embeddings().weight
    if weight.requires_grad:
        raise TrainingError("the language model's head was frozen when its loss was set up, and is now to be trained")
    losses, nll = token_losses(hidden[row, place], weight, targets[row, place], smoothing if model.training else 0.0)
    count = len(row) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, torch.Tensor) and count.ndim:
        count = count[row]
    sums = nll.new_zeros(len(labels), 2).index_add(0, row, torch.stack([nll, torch.ones_like(nll)], 1))
    return CompletionOutput(loss=(losses / count).sum(), rows=sums)
