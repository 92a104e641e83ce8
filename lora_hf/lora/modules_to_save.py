"""The module that replaces a task head and holds a trained copy of it for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_hf.lora.active_adapter import AdapterState, BatchRouting
from lora_hf.lora.precision import keep_dtype


class ModulesToSaveWrapper(nn.Module):
    """A task head with a trained copy per adapter, named and structured as in PEFT.

    The copies are fp32 whatever the base's precision. The base's own head is frozen and runs if no adapter is active.
    """

    def __init__(self, original_module: nn.Module, adapter_state: AdapterState) -> None:
        super().__init__()
        self.original_module: Any = original_module.requires_grad_(False)
        self.modules_to_save: Any = nn.ModuleDict()  # by adapter name
        self.adapter_state = adapter_state
        self.training = original_module.training

    def add(self, name: str, head: nn.Module | None = None) -> None:
        """Adds the head of adapter `name`; without `head`, a copy of the base's own."""
        own: nn.Module = copy.deepcopy(self.original_module) if head is None else head
        self.modules_to_save[name] = own.float().requires_grad_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModulesToSaveWrapper:
        self.original_module._apply(fn, recurse)
        self.modules_to_save._apply(keep_dtype(fn), recurse)
        return self

    @property
    def active(self) -> str | None:
        """The adapter whose head runs in this context; None for the base's own or a mix."""
        return self.adapter_state.active(self.modules_to_save)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The output of the active head, with floating-point inputs cast to its precision.

        If each row has its own adapter, the output is fp32, and the rows of heads with fewer labels end in -inf.
        """
        routing = self.adapter_state.routing
        if routing is None:
            return self._run(self.active, *inputs, **named)
        return self._run_mixed(routing, *inputs, **named)

    def _run_mixed(self, routing: BatchRouting, hidden: Tensor, **named: Any) -> Tensor:
        parts = []
        for name in (*routing.names, None):
            rows = routing.rows_of(name, len(hidden))
            if len(rows):
                head = name if name in self.modules_to_save else None
                parts.append((rows, self._run(head, hidden[rows], **named).float()))
        width = max(part.shape[-1] for _, part in parts)
        logits = parts[0][1].new_full((len(hidden), *parts[0][1].shape[1:-1], width), -torch.inf)
        for rows, part in parts:
            logits[rows, ..., : part.shape[-1]] = part
        return logits

    def _run(self, name: str | None, *inputs: Any, **named: Any) -> Any:
        head = self.original_module if name is None else self.modules_to_save[name]
        dtype = next(head.parameters()).dtype

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return head(*map(cast, inputs), **{key: cast(value) for key, value in named.items()})
