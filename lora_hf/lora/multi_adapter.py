"""Several adapters on one model: a thread's own choice, an adapter for each row of a batch, and letting go of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import BatchRouting
from lora_hf.lora.inject import adapter_slots, adapter_state, check_adapter_exists, set_adapter


@contextmanager
def use_adapter(model: PreTrainedModel, name: str | None) -> Iterator[PreTrainedModel]:
    """Inside, this thread runs adapter `name` (None: the bare base), whatever other threads run on the same model.

    Raises:
        AdapterError: the model has no adapter of that name, or another one is merged into it.
    """
    switch = adapter_state(model)
    check_adapter_exists(switch, name)
    with switch.override(name):
        yield model


@contextmanager
def mix_adapters(
    model: PreTrainedModel,
    rows: Sequence[str | None],
    stacks: dict[Any, Any] | None = None,
    among: Sequence[str] = (),
    masked: bool = False,
) -> Iterator[PreTrainedModel]:
    """Inside, this thread runs each row of a batch under its own adapter: `rows` names them, None is the bare base.

    Forward passes and `generate` (greedy, beams, sampling) take a batch of `len(rows)` rows. Logits of a classifier are
    `(rows, most labels)`, -inf behind the last label of a row whose adapter has fewer. Weights must not change inside,
    unless gradients are taken.

    Args:
        rows: the adapter of each row.
        stacks: a dict, empty at first, that keeps what is made of the adapters' weights from one mixture to the next;
            with a new one wherever a weight has changed since.
        among: adapters to stack with those of the rows. Where different ones meet in each batch, naming all of them
            each time has `stacks` made once.
        masked: where gradients are taken, multiply each row by all plain adapters at once and mask what is not its own:
            faster for many small ones. An infinite number in one of them then spoils the others too.

    Raises:
        AdapterError: no rows, an adapter that the model does not have, or one that is merged into the base.
    """
    switch = adapter_state(model)
    if not rows:
        raise AdapterError("a mixture needs a name for each row of the batch, found no rows")
    for name in dict.fromkeys((*rows, *among)):
        check_adapter_exists(switch, name)
    with switch.override(BatchRouting(rows, stacks, among, masked)):
        yield model


def unload_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Takes adapter `name` and its head off the model; where it was the active one, the bare base is.

    No other thread may be running it.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    switch = adapter_state(model)
    check_adapter_exists(switch, name)
    if switch.active_adapter == name or switch.merged:
        set_adapter(model, None if switch.active_adapter == name else switch.active_adapter)
    for place, _ in adapter_slots(model):
        if name in place:
            del place[name]
    switch.labels.pop(name, None)
    del switch.names[name]
    return model
