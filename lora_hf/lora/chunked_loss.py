"""The loss of a causal language model, with logits only for the tokens that have a label.

Two thirds of the tokens of an E2E row have none, and with a vocabulary of 50,000 the logits of a batch are by far its
largest tensor. After `enable_chunked_loss(model)` a call with labels returns their loss and each row's share of it, and
never holds more logits than a chunk of tokens; a call without labels, as in generation, is unchanged.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from lora_hf.core.errors import TrainingError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.host_batch import NOTHING, ON_HOST, to_device
from lora_hf.lora.kernels.cross_entropy import token_losses


@dataclass
class CompletionOutput(ModelOutput):
    """The loss in nats per labeled token, and `(rows, 2)`: the summed nll of each row and its number of labels."""

    loss: Tensor | None = None
    rows: Tensor | None = None


def enable_chunked_loss(model: PreTrainedModel, smoothing: float = 0.0) -> bool:
    """Makes calls with labels skip all other logits.

    The head must be frozen: the loss gives its weight no gradient.

    Args:
        smoothing: that of the training loss (`kernels.cross_entropy.token_losses`); evaluation uses the plain nll.

    Returns:
        Whether this model supports it. If not, it is unchanged.
    """
    head = model.get_output_embeddings()
    if getattr(model.forward, "func", None) is _forward:
        return True
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or not architecture.plain_logits or not isinstance(head, nn.Linear):
        return False
    if head.bias is not None or head.weight.requires_grad:
        return False
    if getattr(model.config, "output_router_logits", False):  # a second loss, which balances the experts
        return False
    model.forward = functools.wraps(model.forward)(functools.partial(_forward, model, model.forward, smoothing))
    return True


def _forward(
    model: Any,
    plain_forward: Any,
    smoothing: float,
    *inputs: Any,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **named: Any,
) -> Any:
    """`num_items_in_batch` divides the sum of the losses."""
    if labels is None:
        return plain_forward(*inputs, **named)
    own = named.get(ON_HOST, NOTHING).get("labels", labels)[:, 1:]
    row, position = (to_device(index, labels.device) for index in (own != IGNORE_INDEX).nonzero(as_tuple=True))
    hidden = model.base_model(*inputs, **named)[0]
    targets = labels[:, 1:]
    weight = model.get_output_embeddings().weight
    if weight.requires_grad:
        raise TrainingError(
            "the language model's head was frozen when its loss was set up, but requires gradients now; freeze it again"
        )
    smoothing = smoothing if model.training else 0.0
    losses, nll = token_losses(hidden[row, position], weight, targets[row, position], smoothing)
    count = len(row) if num_items_in_batch is None else num_items_in_batch
    sums = nll.new_zeros(len(labels), 2).index_add(0, row, torch.stack([nll, torch.ones_like(nll)], 1))
    return CompletionOutput(loss=(losses / count).sum(), rows=sums)
