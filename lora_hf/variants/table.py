"""Which class holds A and B of which variant."""

from __future__ import annotations

import torch
from torch import nn

from lora_hf.layers import LoraLinear, LoraWeights
from lora_hf.variants.dora import DoraWeights
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
) -> LoraWeights:
    """Fresh A and B for one projection; `start` (`pissa`, `olora`) names a start that is still to be computed."""
    if use_dora:
        return DoraWeights(layer.original_weight(), slices, r, lora_alpha, lora_dropout, use_rslora)
    plain = (layer.in_features, slices, r, lora_alpha, lora_dropout, layer.weight.device, use_rslora)
    return StartedWeights(start, *plain) if start else LoraWeights(*plain)


def initialise(weights: LoraWeights, layer: LoraLinear, init: str) -> None:
    """Gives fresh A and B the values that `init_lora_weights` names; `default` is what they have already.

    `gaussian` draws A from a normal distribution of deviation `1 / r`, as PEFT does.
    """
    if isinstance(weights, StartedWeights):
        weights.begin(layer.original_weight())
    elif init == "gaussian":
        with torch.no_grad():
            nn.init.normal_(weights.lora_A, std=1 / weights.r)
