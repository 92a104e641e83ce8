"""LoRA fine-tuning for pretrained Hugging Face models. The public names are resolved when they are first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_hf.adapters import load_adapter, save_adapter
    from lora_hf.combining import combine_adapters
    from lora_hf.config import LoraConfig
    from lora_hf.convert.loralib import load_loralib, save_loralib
    from lora_hf.errors import UserError
    from lora_hf.hub import push_adapter
    from lora_hf.injection import (
        count_parameters,
        eject,
        inject,
        lora_state_dict,
        mark_only_lora_as_trainable,
        merge,
        merge_drift,
        set_adapter,
        unmerge,
    )
    from lora_hf.joint import train_together
    from lora_hf.mixing import mix_adapters, unload_adapter, use_adapter
    from lora_hf.models import dequantise, quantise
    from lora_hf.planning import Site, plan
    from lora_hf.serving.engine import Engine

_HOME = {
    "Engine": "serving.engine",
    "LoraConfig": "config",
    "Site": "planning",
    "UserError": "errors",
    "combine_adapters": "combining",
    "count_parameters": "injection",
    "dequantise": "models",
    "eject": "injection",
    "inject": "injection",
    "load_adapter": "adapters",
    "load_loralib": "convert.loralib",
    "lora_state_dict": "injection",
    "mark_only_lora_as_trainable": "injection",
    "merge": "injection",
    "merge_drift": "injection",
    "mix_adapters": "mixing",
    "plan": "planning",
    "push_adapter": "hub",
    "quantise": "models",
    "save_adapter": "adapters",
    "save_loralib": "convert.loralib",
    "set_adapter": "injection",
    "train_together": "joint",
    "unload_adapter": "mixing",
    "unmerge": "injection",
    "use_adapter": "mixing",
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
    "train_together",
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
