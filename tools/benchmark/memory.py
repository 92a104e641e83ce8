"""The peak memory of a training process by part."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryWatch:
    """From a built model to the end of its training, all in bytes.

    On a GPU the allocator's counters; elsewhere the resident set of the process, whose peak Linux lets a process reset
    (proc(5), clear_refs). Parts of tensors are counted exactly; what the peak has beyond the standing model, gradients
    and optimiser is `activations`, the workspace of kernels included.
    """

    def __init__(self, model: nn.Module, trains_base: bool) -> None:
        parameters = list(model.parameters())
        self.device = parameters[0].device
        self.weights = _size([*parameters, *model.buffers()])
        self.trained = _size(parameter for parameter in parameters if parameter.requires_grad)
        # What is trained beside the base (adapters, a head) counts as memory above the base's weights.
        self.added = 0 if trains_base else self.trained
        self.gradients = 0
        _first_step(self.device)
        for parameter in parameters:
            parameter.detach().sum()  # a file's weights may come into memory only when they are read
        gc.collect()
        self.standing = self._reset()

    def see_gradients(self, model: nn.Module) -> None:
        """To be called when gradients are there."""
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.gradients = max(self.gradients, _size(grads))

    def parts(self, optimizer: Any) -> dict[str, int | None]:
        """What was reached since the beginning; None where the system does not tell."""
        states = (value for state in optimizer.state.values() for value in state.values())
        held = _size(value for value in states if isinstance(value, torch.Tensor))
        peak = self._peak() if self.standing is not None else None
        above = None if peak is None or self.standing is None else max(0, peak - self.standing)
        return {
            "weights": self.weights,
            "trained_weights": self.trained,
            "gradients": self.gradients,
            "optimizer": held,
            "activations": None if above is None else max(0, above - self.gradients - held),
            "above_base": None if above is None else above + self.added,
            "peak": peak,
        }

    def _reset(self) -> int | None:
        """What is held now, from where the peak is counted anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        try:
            # Memory that loading freed and the allocator kept would hide as much of the activations.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR.write_text("5", encoding="ascii")
        except (OSError, AttributeError, TypeError):
            return None
        return _status("VmRSS")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # getrusage would not do: Linux hands a started process the peak of the one that started it.
        return _status("VmHWM")


def _first_step(device: torch.device) -> None:
    """What libraries set up at a process's first step (threads, kernels, modules; 20 MB on a CPU) is no side's own."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(768, 768, device=device, dtype=dtype)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.randn(64, 768, device=device, dtype=dtype)).sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
