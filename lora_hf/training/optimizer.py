"""LoRA+: lora_B learns faster than lora_A, `lr_B = ratio * lr_A`, arXiv 2402.12354, section 4; the paper advises 16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lora_hf.lora.inject import lora_layers
from lora_hf.lora.variants.embedding import EmbeddingWeights


def apply_loraplus(optimizer: torch.optim.Optimizer, fast: Iterable[nn.Parameter], ratio: float) -> None:
    """Moves parameters into new groups with `ratio` times the learning rate of their old group.

    A new group keeps the other settings of the old one. A schedule scales both in the same way.
    """
    chosen = set(fast)
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in chosen]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * ratio})


def loraplus_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The lora_B of the active adapter, except in embeddings, where lora_B starts random and lora_A at zero."""
    weights = [layer.adapters[layer.active] for layer in lora_layers(model).values() if layer.active]
    return [each.lora_B for each in weights if not isinstance(each, EmbeddingWeights)]
