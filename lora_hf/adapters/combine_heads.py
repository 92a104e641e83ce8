"""The heads of adapters that are combined: no update of a base, so every method averages them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

from torch import nn
from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError
from lora_hf.lora.inject import adapter_heads, adapter_state, get_labels
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.target_modules import comma_separated


def shared_heads(model: PreTrainedModel, adapters: Collection[str]) -> list[ModulesToSaveWrapper]:
    """The heads that the adapters train; raises AdapterError for one that only some of them train."""
    shared = []
    for path, head in adapter_heads(model).items():
        training = [name for name in adapters if name in head.modules_to_save]
        if 0 < len(training) < len(adapters):
            raise AdapterError(
                f"{path}: of {', '.join(adapters)}, only {', '.join(training)} fully trained this module, so it has no "
                "average; combine adapters with the same modules_to_save"
            )
        shared += [head] if training else []
    return shared


def average(heads: nn.ModuleDict, weights: Mapping[str, float]) -> nn.Module:
    states = [(heads[name].state_dict(), weight / sum(weights.values())) for name, weight in weights.items()]
    average = copy.deepcopy(heads[next(iter(weights))])
    average.load_state_dict({key: sum(share * state[key] for state, share in states) for key in states[0][0]})
    return average


def check_same_labels(model: PreTrainedModel, adapters: Collection[str]) -> None:
    """Raises AdapterError for heads of different labels: their average would name the wrong ones."""
    state = adapter_state(model)
    active = {state.active_adapter: get_labels(model)}  # the user may have renamed them
    labels = {name: (state.labels | active)[name][0] for name in adapters if name in state.labels}
    (first, expected), *others = labels.items() or [("", ())]
    for other, found in others:
        if found != expected:
            raise AdapterError(
                f"adapters {first!r} and {other!r} were trained for different labels: {comma_separated(expected)}, and "
                f"{comma_separated(found)}; their heads cannot be combined"
            )
