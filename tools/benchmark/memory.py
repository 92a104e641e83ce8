"""The peak memory of a training process, split into its parts."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryTracker:
    """Tracks memory in bytes, from a built model to the end of training.

    On a GPU it reads the counters of the allocator, elsewhere the resident set of the process, whose peak Linux allows
    to reset (proc(5), clear_refs). The sizes of tensors are exact. `activations` is the rest of the peak, above the
    model, gradients and optimizer; it includes the workspace of kernels.
    """

    def __init__(self, model: nn.Module, trains_base: bool) -> None:
        parameters = list(model.parameters())
        self.device = parameters[0].device
        self.weights = _size([*parameters, *model.buffers()])
        self.trained = _size(parameter for parameter in parameters if parameter.requires_grad)
        # Trained adapters and heads count as memory above the weights of the base.
        self.added = 0 if trains_base else self.trained
        self.gradients = 0
        _warm_up(self.device)
        for parameter in parameters:
            parameter.detach().sum()  # mapped weights may enter memory only when they are read
        gc.collect()
        self.before = self._reset()

    def add_gradients(self, model: nn.Module) -> None:
        """Measures the gradients. Call it while they exist."""
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.gradients = max(self.gradients, _size(grads))

    def summary(self, optimizer: Any) -> dict[str, int | None]:
        """The peak since the beginning and its parts, None where the system does not report the peak."""
        states = (value for state in optimizer.state.values() for value in state.values())
        states_size = _size(value for value in states if isinstance(value, torch.Tensor))
        peak = self._peak() if self.before is not None else None
        above = None if peak is None or self.before is None else max(0, peak - self.before)
        return {
            "weights": self.weights,
            "trained_weights": self.trained,
            "gradients": self.gradients,
            "optimizer": states_size,
            "activations": None if above is None else max(0, above - self.gradients - states_size),
            "above_base": None if above is None else above + self.added,
            "peak": peak,
        }

    def _reset(self) -> int | None:
        """Resets the peak and returns the memory in use now."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        try:
            # Otherwise memory that loading has freed, but the allocator has kept, would hide activations.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR.write_text("5", encoding="ascii")
        except (OSError, AttributeError, TypeError):
            return None
        return _status("VmRSS")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Not getrusage: on Linux, a child inherits the peak of its parent.
        return _status("VmHWM")


def _warm_up(device: torch.device) -> None:
    """Lets libraries set up threads, kernels and modules (20 MB on a CPU), which belong to no side."""
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
