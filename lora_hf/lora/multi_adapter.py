"""Several adapters on one model: one for the current context, one for each row of a batch, and removing one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import BatchRouting
from lora_hf.lora.inject import (
    adapter_dicts,
    adapter_heads,
    adapter_state,
    check_adapter_exists,
    eject,
    get_labels,
    inject_head,
    lora_layers,
    set_adapter,
)
from lora_hf.lora.layers import LoraLinear


@contextmanager
def use_adapter(model: PreTrainedModel, name: str | None) -> Iterator[PreTrainedModel]:
    """Inside, this thread runs adapter `name` (None: the bare base), whatever other threads run on the same model.

    A new thread starts with the choice of `set_adapter`, not with that of the thread that starts it.

    Raises:
        AdapterError: the model has no adapter of that name, or another one is merged into it.
    """
    state = adapter_state(model)
    check_adapter_exists(state, name)
    with state.override(name):
        yield model


@contextmanager
def mix_adapters(
    model: PreTrainedModel,
    rows: Sequence[str | None],
    stacks: dict[Any, Any] | None = None,
    among: Sequence[str] = (),
) -> Iterator[PreTrainedModel]:
    """Inside, this thread runs each row of a batch with its own adapter.

    Forward passes and `generate` (greedy, beams, sampling) take a batch of `len(rows)` rows. The logits of a classifier
    are `(rows, most labels)`, with -inf after the last label of a row whose adapter has fewer. Weights must not change
    inside, unless gradients are taken.

    Args:
        rows: the adapter of each row; None is the bare base.
        stacks: a dict, empty at first, that caches the stacked weights of the adapters from one call to the next. Pass
            a new one after a weight has changed.
        among: adapters to stack together with those of the rows. If each batch has different ones, name all of them
            each time, so that `stacks` holds one entry.

    Raises:
        AdapterError: no rows, an adapter that the model does not have, or one that is merged into the base.
    """
    state = adapter_state(model)
    if not rows:
        raise AdapterError("mix_adapters: expected the adapter of each row of the batch, found no rows")
    for name in dict.fromkeys((*rows, *among)):
        check_adapter_exists(state, name)
    with state.override(BatchRouting(rows, stacks, among)):
        yield model


def move_adapter(source: PreTrainedModel, target: PreTrainedModel, name: str) -> PreTrainedModel:
    """Moves the active adapter of one model, with its head, to another model of the same base, as adapter `name`.

    The two may be the same model. The adapter is active and trainable on the target, which is returned; the source is
    the plain model then.
    """
    weights = {path: layer.adapters[layer.active] for path, layer in lora_layers(source).items() if layer.active}
    heads = {path: head.modules_to_save[head.active] for path, head in adapter_heads(source).items()}
    labels = get_labels(source)
    eject(source)
    state = adapter_state(target)
    for path, each in weights.items():
        layer: Any = target.get_submodule(path)
        if not isinstance(layer, LoraLinear):
            target.set_submodule(path, layer := LoraLinear(layer, state))
        layer.adapters[name] = each.to(layer.device)
    if heads:
        state.labels[name] = labels
    return inject_head(target, name, {path: head.to(target.device) for path, head in heads.items()})


def unload_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Removes adapter `name` and its head from the model; if it was the active one, the bare base is active then.

    No other thread may be running it.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    state = adapter_state(model)
    check_adapter_exists(state, name)
    if name == state.active_adapter or state.merged:
        set_adapter(model, None if name == state.active_adapter else state.active_adapter)
    for adapters, _ in list(adapter_dicts(model)):
        if name in adapters:
            del adapters[name]
    state.labels.pop(name, None)
    del state.names[name]
    return model
