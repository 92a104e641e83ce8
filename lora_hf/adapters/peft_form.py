"""One adapter at one projection as the tensors of PEFT's file, by the end of their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lora_hf.lora.layers import LoraLinear, features
from lora_hf.lora.variants.dora import DoraWeights


def to_peft(layer: LoraLinear, name: str) -> dict[str, torch.Tensor]:
    """A `(n r, in)` and B `(out, n r)` of one standard LoRA that equals the slices: B block-placed, zero elsewhere.

    Beside them DoRA's magnitudes and the trained bias, `(out,)` each, where the adapter has them.
    """
    weights = layer.adapters[name]
    a, stacked = weights.saved_factors()
    r, row = stacked.shape[1], 0
    b = stacked.new_zeros(layer.out_features, len(weights.slices) * r)
    for index, (start, stop) in enumerate(weights.slices):
        b[start:stop, index * r : (index + 1) * r] = stacked[row : row + stop - start]
        row += stop - start
    tensors = dict(zip(factor_names(layer), (a, b), strict=True))
    if isinstance(weights, DoraWeights):
        tensors["lora_magnitude_vector"] = weights.magnitudes(layer.original_weight())
    if weights.bias is not None:
        tensors["base_layer.bias"] = weights.bias
    return tensors


def shapes(plain: nn.Module, r: int, use_dora: bool, bias: bool) -> dict[str, tuple[int, ...]]:
    """What a file must hold for a projection with rank `r` in the file."""
    in_features, out_features = features(plain)
    found: dict[str, tuple[int, ...]] = dict(
        zip(factor_names(plain), ((r, in_features), (out_features, r)), strict=True)
    )
    if use_dora:
        found["lora_magnitude_vector"] = (out_features,)
    if bias and getattr(plain, "bias", None) is not None:
        found["base_layer.bias"] = (out_features,)
    return found


def factor_names(layer: nn.Module) -> tuple[str, str]:
    """What a file calls A and B of a projection, wrapped or plain."""
    plain = layer.base_layer if isinstance(layer, LoraLinear) else layer
    if isinstance(plain, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


@torch.no_grad()
def from_peft(layer: LoraLinear, name: str, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Takes what `to_peft` gave, from the tensors of a file in which it lies under `path`."""
    weights = layer.adapters[name]
    a, b = (tensors[f"{path}.{key}"].float() for key in factor_names(layer))
    stacked = torch.cat(blocks(b, weights.slices))
    if stacked.shape == weights.lora_B.shape:
        weights.lora_A.copy_(a)
        weights.lora_B.copy_(stacked)
    else:
        weights.load_factors(a, stacked)
    if isinstance(weights, DoraWeights):
        weights.load_magnitudes(tensors[f"{path}.lora_magnitude_vector"].float())
    if weights.bias is not None:
        weights.bias.copy_(tensors[f"{path}.base_layer.bias"])


def blocks(b: torch.Tensor, slices: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The B of each slice, from its rows and columns of the whole one."""
    r = b.shape[1] // len(slices)
    return [b[start:stop, index * r : (index + 1) * r] for index, (start, stop) in enumerate(slices)]
