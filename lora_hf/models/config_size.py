"""Refuses a config that describes a model too large to build, before torch or transformers begin to build it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from lora_hf.core.errors import ModelError

MAX_LAYERS = 1000  # the deepest models have about 200; transformers builds them one by one
SUSPICIOUS = 20_000  # a size beyond it is worth counting the parameters for
SUSPICIOUS_VOCABULARY = 1_000_000
MEMORY_FACTOR = 4  # times the memory of the machine: some of it may be swapped, or be that of a GPU


def check_layers(values: Mapping[str, Any], name: str) -> None:
    """Raises ModelError for more layers than any model has.

    Args:
        values: the content of config.json; a config of its class may already list all layers.
    """
    for key, value in _sizes(values) if isinstance(values, Mapping) else ():  # else transformers refuses it
        if "layer" in key and value > MAX_LAYERS:
            raise ModelError(f"{name}: config.json: {key}: expected at most {MAX_LAYERS} layers, found {value:,}")


def check_size(auto: Any, config: PretrainedConfig, dtype: torch.dtype, name: str) -> None:
    """Raises ModelError for a config with more parameters than a machine like this one can hold.

    Args:
        auto: the class of transformers that is to build the model.
    """
    large = [(key, value) for key, value in _sizes(config.to_dict()) if value > _usual(key)]
    if not large:
        return
    listed = ", ".join(f"{key}={value:,}" for key, value in large)
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    except Exception as error:  # transformers does not check a config
        raise ModelError(f"{name}: config.json describes no model that can be built ({listed}): {error}") from error
    needed, memory = parameters * dtype.itemsize, psutil.virtual_memory().total
    if needed > MEMORY_FACTOR * memory:
        raise ModelError(
            f"{name}: config.json ({listed}) describes a model of {needed / 1e9:,.0f} GB; this machine has "
            f"{memory / 1e9:,.0f} GB. Compare config.json with that of the model's source"
        )


def _usual(key: str) -> int:
    """How large a number may be without any parameters to count: positions often have none."""
    return SUSPICIOUS_VOCABULARY if "vocab" in key or "position" in key else SUSPICIOUS


def _sizes(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of a config and of the configs in it that can be the size of something."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and not key.endswith(("_id", "theta")):
            yield key, int(min(value, 2**63)) if value > 0 else 0  # also for infinity and NaN
