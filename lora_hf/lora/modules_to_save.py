"""The wrapper around a fully trained module, such as a task head, with one copy for each adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import AdapterState, BatchRouting
from lora_hf.lora.adapter_dict import AdapterDict
from lora_hf.lora.quantization import unpack_quantized


class ModulesToSaveWrapper(nn.Module):
    """A module with a trained copy per adapter, named and structured as in PEFT.

    The copies are fp32, whatever the precision of the base. The original is frozen and runs if no adapter is active.

    Args:
        within_base: the module is part of the base model (a pooler, an embedding), not of the head. The copies then
            return outputs in the precision of the base.
    """

    def __init__(self, original_module: nn.Module, adapter_state: AdapterState, within_base: bool = False) -> None:
        super().__init__()
        # A packed module could not be trained, and a cast of its inputs to the type of its weights would destroy them.
        self.original_module: Any = unpack_quantized(original_module).requires_grad_(False)
        self.modules_to_save: Any = AdapterDict()
        self.adapter_state = adapter_state
        self.within_base = within_base
        self.training = original_module.training

    def __getattr__(self, name: str) -> Any:
        # What else a model reads of its modules, such as `lm_head.weight`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "original_module" not in modules:
                raise
            own = modules["modules_to_save"][self.active] if self.active else modules["original_module"]
            return getattr(own, name)

    def add(self, name: str, head: nn.Module | None = None) -> None:
        """Adds a copy for adapter `name`: `head`, or by default a copy of the original module."""
        own: nn.Module = copy.deepcopy(self.original_module) if head is None else head
        self.modules_to_save[name] = own.float().requires_grad_(True)

    @property
    def active(self) -> str | None:
        """The adapter whose copy runs in this context; None for the original module, or for a mix."""
        return self.adapter_state.active(self.modules_to_save)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The output of the active copy, with floating-point inputs cast to its precision.

        If each row has its own adapter, the output of a head is fp32, and the rows of heads with fewer labels end in
        -inf.
        """
        routing = self.adapter_state.routing
        if routing is None:
            return self._run(self.active, *inputs, **named)
        if self.within_base:
            return self._run_items(routing, *inputs, **named)
        return self._run_rows(routing, *inputs, **named)

    def _run_items(self, routing: BatchRouting, x: Tensor, **named: Any) -> Any:
        y = self._run(None, x, **named)
        if not isinstance(y, Tensor):
            raise AdapterError(
                f"{type(self.original_module).__name__}: mixed batches need a module that returns a tensor, found "
                f"{type(y).__name__}; run each adapter's rows in a batch of their own"
            )
        return routing.apply(y, x, lambda name, items, _: self._run(name, items, **named), self.modules_to_save)

    def _run_rows(self, routing: BatchRouting, hidden: Tensor, **named: Any) -> Tensor:
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
        module = self.original_module if name is None else self.modules_to_save[name]
        output = module(*_cast(inputs, _dtype(module)), **_cast(named, _dtype(module)))
        return _cast(output, _dtype(self.original_module)) if self.within_base else output


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(each, dtype) for key, each in value.items()}
    return tuple(_cast(each, dtype) for each in value) if type(value) is tuple else value
