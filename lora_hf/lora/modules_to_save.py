"""The module that stands in for a task head and holds a copy of it for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_hf.lora.active_adapter import AdapterState, BatchRouting
from lora_hf.lora.precision import keep_dtype


class ModulesToSaveWrapper(nn.Module):
    """A task head with a trained copy per adapter, as PEFT's class of that name.

    The copies are fp32 whatever the base's precision. The base's own head is frozen and runs if no adapter is active.
    """

    def __init__(self, original_module: nn.Module, switch: AdapterState) -> None:
        super().__init__()
        self.original_module: Any = original_module.requires_grad_(False)
        self.modules_to_save: Any = nn.ModuleDict()  # by the adapter's name
        self.switch = switch
        self.training = original_module.training

    def add(self, name: str, head: nn.Module | None = None) -> None:
        """Adds the head of adapter `name`; without `head`, a copy of the base's own."""
        self.modules_to_save[name] = (
            (copy.deepcopy(self.original_module) if head is None else head).float().requires_grad_(True)
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ModulesToSaveWrapper:
        self.original_module._apply(fn, recurse)
        self.modules_to_save._apply(keep_dtype(fn), recurse)
        return self

    @property
    def active(self) -> str | None:
        """The adapter whose head this thread runs; None for the base's own, or in a mixture."""
        return self.switch.active(self.modules_to_save)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the active head gives, floating-point inputs cast to its precision.

        In a mixture each row has its own head's, in fp32; rows with fewer labels than others end in -inf.
        """
        mixture = self.switch.routing
        return self._one(self.active, *inputs, **named) if mixture is None else self._mixed(mixture, *inputs, **named)

    def _mixed(self, mixture: BatchRouting, hidden: torch.Tensor, **named: Any) -> torch.Tensor:
        parts = []
        for name in (*mixture.names, None):
            rows = mixture.rows_of(name, len(hidden))
            if len(rows):
                parts.append(
                    (rows, self._one(name if name in self.modules_to_save else None, hidden[rows], **named).float())
                )
        width = max(part.shape[-1] for _, part in parts)
        whole = parts[0][1].new_full((len(hidden), *parts[0][1].shape[1:-1], width), -torch.inf)
        for rows, part in parts:
            whole[rows, ..., : part.shape[-1]] = part
        return whole

    def _one(self, name: str | None, *inputs: Any, **named: Any) -> Any:
        head = self.original_module if name is None else self.modules_to_save[name]
        dtype = next(head.parameters()).dtype

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return head(*map(cast, inputs), **{key: cast(value) for key, value in named.items()})
