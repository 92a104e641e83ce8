"""One adapter at one projection as the tensors of PEFT's file, by the end of their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_hf.layers import LoraLinear, LoraWeights
from lora_hf.variants.dora import DoraWeights


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
    tensors = {"lora_A.weight": a, "lora_B.weight": b}
    if isinstance(weights, DoraWeights):
        tensors["lora_magnitude_vector"] = weights.magnitudes(layer.original_weight())
    if weights.bias is not None:
        tensors["base_layer.bias"] = weights.bias
    return tensors


@torch.no_grad()
def from_peft(weights: LoraWeights, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Takes what `to_peft` gave, from the tensors of a file in which it lies under `path`."""
    a, b = tensors[f"{path}.lora_A.weight"].float(), tensors[f"{path}.lora_B.weight"].float()
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
