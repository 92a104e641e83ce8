"""Which class holds A and B of which variant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.slices import Slices
from lora_hf.lora.variants.decomposed import DecomposedWeights
from lora_hf.lora.variants.dora import DoraWeights
from lora_hf.lora.variants.embedding import EmbeddingWeights


@dataclass(frozen=True)
class Variant:
    """What an adapter does besides plain LoRA, in PEFT's words.

    `start` is `pissa` or `olora` if A and B start as a part of the weight; `bias` trains a projection's bias if it has
    one; `lora_bias` gives B a bias of its own.
    """

    use_rslora: bool = False
    use_dora: bool = False
    start: str = ""
    bias: bool = False
    lora_bias: bool = False


PLAIN = Variant()


def new_weights(
    layer: LoraLinear, slices: Slices, r: int, lora_alpha: float, lora_dropout: float = 0.0, variant: Variant = PLAIN
) -> LoraWeights:
    """Fresh A and B for one projection."""
    plain = (layer.in_features, slices, r, lora_alpha, lora_dropout, layer.device, variant.use_rslora)
    if isinstance(layer.base_layer, nn.Embedding):
        weights = EmbeddingWeights(*plain)
    elif variant.use_dora:
        weights = DoraWeights(layer.original_weight(), *plain)
    else:
        weights = DecomposedWeights(variant.start, *plain) if variant.start else LoraWeights(*plain)
    bias = getattr(layer.base_layer, "bias", None)
    if variant.bias and bias is not None:
        weights.bias = nn.Parameter(bias.detach().float().clone())
    if variant.lora_bias:
        weights.lora_bias = nn.Parameter(torch.zeros(layer.out_features, device=layer.device))
    return weights


def initialise(weights: LoraWeights, layer: LoraLinear, init: str) -> None:
    """Gives fresh A and B the values that `init_lora_weights` names; they already have those of `default`.

    `gaussian` draws A from a normal distribution of standard deviation `1 / r`, as in PEFT.
    """
    if isinstance(weights, DecomposedWeights):
        weights.start_from(layer.original_weight())
    elif init == "gaussian" and not isinstance(weights, EmbeddingWeights):
        with torch.no_grad():
            nn.init.normal_(weights.lora_A, std=1 / weights.r)
