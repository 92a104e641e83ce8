"""Which class holds A and B of which variant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.variants.decomposed import DecomposedWeights
from lora_hf.lora.variants.dora import DoraWeights
from lora_hf.lora.variants.embedding import EmbeddingWeights


@dataclass(frozen=True)
class Variant:
    """What an adapter does beside plain LoRA, in PEFT's words.

    `start` (`pissa`, `olora`) names a start that is still to be computed; `bias` trains a projection's bias,
    where there is one.
    """

    use_rslora: bool = False
    use_dora: bool = False
    start: str = ""
    bias: bool = False


PLAIN = Variant()


def new_weights(
    layer: LoraLinear,
    slices: list[tuple[int, int]],
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    variant: Variant = PLAIN,
) -> LoraWeights:
    """Fresh A and B for one projection."""
    plain = (layer.in_features, slices, r, lora_alpha, lora_dropout, layer.device, variant.use_rslora)
    if isinstance(layer.base_layer, nn.Embedding):
        weights = EmbeddingWeights(layer, r, lora_alpha, variant.use_rslora)
    elif variant.use_dora:
        weights = DoraWeights(layer.original_weight(), slices, r, lora_alpha, lora_dropout, variant.use_rslora)
    else:
        weights = DecomposedWeights(variant.start, *plain) if variant.start else LoraWeights(*plain)
    own = layer.bias if layer.unmerged_bias is None else layer.unmerged_bias
    if variant.bias and own is not None:
        weights.bias = nn.Parameter(own.detach().float().clone())
    return weights


def initialise(weights: LoraWeights, layer: LoraLinear, init: str) -> None:
    """Gives fresh A and B the values that `init_lora_weights` names; `default` is what they have already.

    `gaussian` draws A from a normal distribution of deviation `1 / r`, as PEFT does.
    """
    if isinstance(weights, DecomposedWeights):
        weights.begin(layer.original_weight())
    elif init == "gaussian" and not isinstance(weights, EmbeddingWeights):
        with torch.no_grad():
            nn.init.normal_(weights.lora_A, std=1 / weights.r)
