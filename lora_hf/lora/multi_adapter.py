"""Several adapters on one model: choose one per context or per row of a batch, and remove one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import BatchRouting
from lora_hf.lora.adapter_dict import modules_of_base
from lora_hf.lora.inject import adapter_dicts, adapter_state, check_adapter_exists, restore_base, set_adapter
from lora_hf.lora.layers import AdaptedModule
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.wrappers import unwrap_model

SEQUENCE_FIRST = ("fsmt", "led", "longformer", "xlnet")  # types with projections of (seq, batch, hidden)


@contextmanager
def use_adapter(model: PreTrainedModel, name: str | None) -> Iterator[PreTrainedModel]:
    """Runs adapter `name` (None: the bare base) in this thread only, inside the `with` block.

    A new thread starts with the adapter that `set_adapter` chose, not with that of the thread that starts it.

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
    """Runs each row of a batch with its own adapter, in this thread only, inside the `with` block.

    Forward passes and `generate` (greedy, beam search, sampling) take a batch of `len(rows)` rows. A classifier returns
    logits `(rows, largest number of labels)`; rows whose adapter has fewer labels are filled with -inf. Do not change
    weights inside the block unless gradients are computed.

    Args:
        rows: the adapter of each row; None is the bare base.
        stacks: a dict, empty at first, that caches the adapters' weights between calls. Its keys are
            `(layer, adapter or adapters, dtype)`; delete the entries of an adapter whose weights have changed.
        among: further adapters to stack with those of the rows. If the adapters vary from batch to batch, always name
            all of them, so that `stacks` holds one entry for all batches.

    Raises:
        AdapterError: `rows` is empty; an adapter is unknown or merged into the base; or there are several adapters, and
            the layers of the model do not have rows as their first dimension.
    """
    state = adapter_state(model)
    if not rows:
        raise AdapterError("mix_adapters: expected the adapter of each row of the batch, found no rows")
    for name in dict.fromkeys((*rows, *among)):
        check_adapter_exists(state, name)
    kind = unwrap_model(model).config.model_type
    if kind in SEQUENCE_FIRST and len(set(rows)) > 1:
        raise AdapterError(
            f"mix_adapters: the layers of {kind} get tokens before rows, so its rows cannot have adapters of their "
            "own; run each adapter's rows in a batch of their own"
        )
    with state.override(BatchRouting(rows, stacks, among)):
        yield model


def unload_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Removes adapter `name` and its head from the model. If it was active, the bare base becomes active.

    A module that no other adapter changes becomes the base's own again, and without any adapter the model is plain, as
    after `eject`. No other thread may be running the adapter.

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
    if not state.names:
        restore_base(unwrap_model(model))
    for path, module in list(modules_of_base(model)):
        if isinstance(module, AdaptedModule) and not module.adapters:
            model.set_submodule(path, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
            model.set_submodule(path, module.original_module)
    return model
