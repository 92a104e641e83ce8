"""A batch as the collator made it: from it a step learns the lengths of its rows without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ON_HOST = "on_host"  # the key of a batch
COPIED = ("attention_mask", "input_ids", "labels")


class HostBatch:
    """Tensors that stay in the host's memory while the batch that holds them moves to a device.

    Accelerate, DDP and FSDP move the tensors of mappings, sequences and dataclasses; they leave this object alone.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._tensors = {name: batch[name] for name in COPIED if isinstance(batch.get(name), Tensor)}

    def get(self, name: str, device_tensor: Tensor) -> Tensor:
        """A tensor of the batch; copied from the device, which waits for it, if this one is not of that batch."""
        tensor = self._tensors.get(name)
        return device_tensor.cpu() if tensor is None or tensor.shape != device_tensor.shape else tensor


NOTHING = HostBatch({})


def keep_on_host(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The collator, with each batch's `HostBatch` in it."""

    def collate_and_keep(features: Any) -> Any:
        batch = collate(features)
        batch[ON_HOST] = HostBatch(batch)
        return batch

    return collate_and_keep


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies without waiting: a copy from memory that is not pinned waits for all that the device has yet to do."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=device.type != "mps")  # where such a copy may read freed memory
