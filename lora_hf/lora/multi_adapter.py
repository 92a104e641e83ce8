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
    adapter_state,
    check_adapter_exists,
    set_adapter,
)
from lora_hf.lora.variants.biases import biased_modules
from lora_hf.lora.variants.tokens import token_modules
from lora_hf.lora.wrappers import unwrap_model

SEQUENCE_FIRST = ("fsmt", "led", "longformer", "xlnet")  # types with projections of (seq, batch, hidden)


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
        stacks: a dict, empty at first, that caches the weights of the adapters from one call to the next. Its keys are
            `(layer, adapter or adapters, dtype)`; drop those of an adapter whose weights have changed.
        among: adapters to stack together with those of the rows. If each batch has different ones, name all of them
            each time, so that `stacks` holds one entry for them.

    Raises:
        AdapterError: no rows, an adapter that the model does not have, or one that is merged into the base; several
            adapters on a model whose layers get tokens before rows.
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
    for path, module in (biased_modules(model) | token_modules(model)).items():
        if not module.adapters:  # what is left of it would keep A and B away
            model.set_submodule(path, module.base_layer)
    state.labels.pop(name, None)
    del state.names[name]
    return model
