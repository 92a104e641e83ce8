"""LoRA fine-tuning for pretrained Hugging Face models. Public names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_hf.adapters.combine import combine_adapters
    from lora_hf.adapters.convert.loralib import load_loralib, save_loralib
    from lora_hf.adapters.pretrained import inject, load_adapter
    from lora_hf.adapters.push import push_adapter
    from lora_hf.adapters.save_load import save_adapter
    from lora_hf.core.config.schema import LoraConfig
    from lora_hf.core.errors import UserError
    from lora_hf.lora.inject import (
        count_parameters,
        eject,
        lora_state_dict,
        mark_only_lora_as_trainable,
        merge,
        merge_drift,
        set_adapter,
        unmerge,
    )
    from lora_hf.lora.multi_adapter import mix_adapters, unload_adapter, use_adapter
    from lora_hf.lora.target_modules import Site, plan
    from lora_hf.models.load import dequantise, quantise
    from lora_hf.serving.engine import Engine

_HOME = {
    "Engine": "serving.engine",
    "LoraConfig": "core.config.schema",
    "Site": "lora.target_modules",
    "UserError": "core.errors",
    "combine_adapters": "adapters.combine",
    "count_parameters": "lora.inject",
    "dequantise": "models.load",
    "eject": "lora.inject",
    "inject": "adapters.pretrained",
    "load_adapter": "adapters.pretrained",
    "load_loralib": "adapters.convert.loralib",
    "lora_state_dict": "lora.inject",
    "mark_only_lora_as_trainable": "lora.inject",
    "merge": "lora.inject",
    "merge_drift": "lora.inject",
    "mix_adapters": "lora.multi_adapter",
    "plan": "lora.target_modules",
    "push_adapter": "adapters.push",
    "quantise": "models.load",
    "save_adapter": "adapters.save_load",
    "save_loralib": "adapters.convert.loralib",
    "set_adapter": "lora.inject",
    "unload_adapter": "lora.multi_adapter",
    "unmerge": "lora.inject",
    "use_adapter": "lora.multi_adapter",
}

__all__ = [
    "Engine",
    "LoraConfig",
    "Site",
    "UserError",
    "combine_adapters",
    "count_parameters",
    "dequantise",
    "eject",
    "inject",
    "load_adapter",
    "load_loralib",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merge_drift",
    "mix_adapters",
    "plan",
    "push_adapter",
    "quantise",
    "save_adapter",
    "save_loralib",
    "set_adapter",
    "unload_adapter",
    "unmerge",
    "use_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_hf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
