"""Which class holds A and B of which variant."""

from __future__ import annotations

import torch
from torch import nn

from lora_hf.layers import LoraLinear, LoraWeights
from lora_hf.variants.dora import DoraWeights
from lora_hf.variants.embedding import EmbeddingWeights
from lora_hf.variants.started import StartedWeights


def new_weights(
    layer: LoraLinear,
    slices: list[tuple[int, int]],
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    start: str = "",
    bias: bool = False,
) -> LoraWeights:
    """Fresh A and B for one projection; `start` (`pissa`, `olora`) names a start that is still to be computed.

    Args:
        bias: whether the adapter trains the projection's bias, where there is one.
    """
    plain = (layer.in_features, slices, r, lora_alpha, lora_dropout, layer.device, use_rslora)
    if isinstance(layer.base_layer, nn.Embedding):
        weights = EmbeddingWeights(layer, r, lora_alpha, use_rslora)
    elif use_dora:
        weights = DoraWeights(layer.original_weight(), slices, r, lora_alpha, lora_dropout, use_rslora)
    else:
        weights = StartedWeights(start, *plain) if start else LoraWeights(*plain)
    own = layer.bias if layer.unmerged_bias is None else layer.unmerged_bias
    if bias and own is not None:
        weights.bias = nn.Parameter(own.detach().float().clone())
    return weights


def initialise(weights: LoraWeights, layer: LoraLinear, init: str) -> None:
    """Gives fresh A and B the values that `init_lora_weights` names; `default` is what they have already.

    `gaussian` draws A from a normal distribution of deviation `1 / r`, as PEFT does.
    """
    if isinstance(weights, StartedWeights):
        weights.begin(layer.original_weight())
    elif init == "gaussian" and not isinstance(weights, EmbeddingWeights):
        with torch.no_grad():
            nn.init.normal_(weights.lora_A, std=1 / weights.r)
