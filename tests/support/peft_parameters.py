"""Finds the parameters of PEFT that correspond to ours."""

from __future__ import annotations

from torch import nn


def paired_parameters(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Each of our trained parameters with that of peft."""
    named = dict(theirs.named_parameters())
    pairs = {}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = "base_model.model." + name
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                other = other.replace(f".adapters.default.{part}", f".{part}.default.weight")
            if other not in named and ".lora_" in other:
                other = other.replace(".lora_", ".lora_embedding_").removesuffix(".weight")
            if name.endswith(".adapters.default.bias"):
                stem = "base_model.model." + name.removesuffix(".adapters.default.bias")
                other = next(key for key in (f"{stem}.base_layer.bias", f"{stem}.bias") if key in named)
            pairs[name] = (parameter, named[other])
    return pairs
