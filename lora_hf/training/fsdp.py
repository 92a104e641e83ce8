"""FSDP2 for a frozen base: the base is sharded over the processes, and what is trained stays whole in each.

What LoRA trains is small, so sharding it would save nothing; whole, it keeps its own precision beside a base in
another, and is saved, loaded and stepped as in one process. Its gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_hf.core.errors import ConfigError
from lora_hf.lora.fingerprint import fingerprint, remember


def keep_whole(model: PreTrainedModel, plugin: Any, device: torch.device) -> list[nn.Parameter]:
    """Tells accelerate's FSDP plugin to shard the layers and to leave alone what is trained; returns that.

    Raises:
        ConfigError: nothing is frozen, or FSDP's first version, which flattens trained and frozen parameters into one.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("train.method=full: FSDP shards a frozen base here; use DDP or DeepSpeed, or train LoRA")
    version = getattr(plugin, "fsdp_version", 1)
    if version != 2:
        raise ConfigError(f"FSDP: expected fsdp_version 2, found {version}; see configs/accelerate/fsdp2.yaml")
    remember(model, fingerprint(model))  # once it is sharded no process holds the base
    trained = [
        module
        for module in model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    for module in trained:
        module.to(device)
    plugin.ignored_modules = trained
    if plugin.transformer_cls_names_to_wrap is None:
        # What RoBERTa and BERT name themselves holds their embeddings, which accelerate shards once more.
        lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layers in lists for layer in layers})
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gives every process the mean of the gradients of all."""
    import torch.distributed as dist

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
