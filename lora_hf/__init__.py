"""LoRA fine-tuning for pretrained Hugging Face models. The public names are resolved when they are first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_hf.adapters import load_adapter, save_adapter
    from lora_hf.combining import combine_adapters
    from lora_hf.config import LoraConfig
    from lora_hf.errors import UserError
    from lora_hf.injection import (
        Site,
        count_parameters,
        eject,
        inject,
        lora_state_dict,
        mark_only_lora_as_trainable,
        merge,
        plan,
        set_adapter,
        unmerge,
    )

_HOME = {
    "LoraConfig": "config",
    "Site": "injection",
    "UserError": "errors",
    "combine_adapters": "combining",
    "count_parameters": "injection",
    "eject": "injection",
    "inject": "injection",
    "load_adapter": "adapters",
    "lora_state_dict": "injection",
    "mark_only_lora_as_trainable": "injection",
    "merge": "injection",
    "plan": "injection",
    "save_adapter": "adapters",
    "set_adapter": "injection",
    "unmerge": "injection",
}

__all__ = [
    "LoraConfig",
    "Site",
    "UserError",
    "combine_adapters",
    "count_parameters",
    "eject",
    "inject",
    "load_adapter",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "plan",
    "save_adapter",
    "set_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_hf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
