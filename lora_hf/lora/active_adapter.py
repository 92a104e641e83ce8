"""Selects the adapter that runs: globally, for one thread, or for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lora_hf.core.errors import AdapterError
from lora_hf.lora.host_batch import to_device

STATE_ATTRIBUTE = "lora_adapter_state"  # the attribute of a base model that holds its AdapterState
Labels = tuple[tuple[str, ...], str | None]  # the label names and the problem type


@dataclass(frozen=True)
class Segments:
    """The items of a batch, sorted by adapter. An item is a row, or a token if the model runs without padding.

    Attributes:
        count: the number of items.
        order: the indices that sort the items, those of the bare base last; None if they are already sorted.
        ends: for each adapter, the end of its range among the sorted items.
    """

    count: int
    order: Tensor | None
    ends: tuple[int, ...]


class BatchRouting:
    """Assigns an adapter to each row of a batch; None is the bare base. Takes the arguments of `mix_adapters`.

    Attributes:
        names: the adapters in alphabetical order.
        tokens: the segments of the tokens while the model runs without padding.
        stacks: the weights that each layer caches, see `mix_adapters`.
    """

    def __init__(
        self,
        rows: Sequence[str | None],
        stacks: dict[Any, Any] | None = None,
        among: Sequence[str] = (),
    ) -> None:
        self.names = tuple(sorted({name for name in (*rows, *among) if name is not None}))
        self.tokens: Segments | None = None
        self.stacks = {} if stacks is None else stacks
        # The bare base comes after all adapters.
        self._adapter_of_row = torch.tensor([self._index(name) for name in rows])
        self._segments: dict[int, Segments] = {}

    def rows_of(self, name: str | None, count: int) -> Tensor:
        """The indices of the rows of one adapter in a batch of `count` rows."""
        return (self._repeated(count) == self._index(name)).nonzero()[:, 0]

    def segments(self, count: int) -> Segments:
        """The segments of a batch of `count` rows, in beam search a multiple of the number of named rows."""
        if count not in self._segments:
            indices = self._repeated(count)
            ends = torch.bincount(indices, minlength=len(self.names) + 1)[:-1].cumsum(0)
            is_sorted = bool((indices.diff() >= 0).all())
            order = None if is_sorted else indices.argsort(stable=True)
            self._segments[count] = Segments(count, order, tuple(ends.tolist()))
        return self._segments[count]

    def items(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Segments]:
        """Input and output of a layer with items as their first dimension, and the segments of the items."""
        if self.tokens is not None and x.shape[:2] == (1, self.tokens.count):
            return x[0], y[0], self.tokens
        if self.tokens is not None and len(x) == 1:
            # BERT's pooler reads the first of all tokens. Its output is discarded and computed again by row.
            return x, y, Segments(1, None, (0,) * len(self.names))
        return x, y, self.segments(len(x))

    def apply(
        self, y: Tensor, x: Tensor, change: Callable[[str, Tensor, Tensor], Tensor], adapters: Container[str]
    ) -> Tensor:
        """Replaces the items of each of `adapters` in `y` with `change(name, x, y)` of those items."""
        if not any(name in adapters for name in self.names):
            return y
        inputs, outputs, segments = self.items(x, y)
        changed = outputs.clone()
        for name, start, end in self.spans(segments, adapters):
            items = slice(start, end) if segments.order is None else to_device(segments.order[start:end], y.device)
            changed[items] = change(name, inputs[items], outputs[items])
        return changed.view_as(y)

    def spans(self, segments: Segments, adapters: Container[str]) -> Iterator[tuple[str, int, int]]:
        """The range `(name, start, end)` of sorted items of each of `adapters` that has any."""
        for name, start, end in zip(self.names, (0, *segments.ends), segments.ends, strict=False):
            if name in adapters and end > start:
                yield name, start, end

    def _index(self, name: str | None) -> int:
        return len(self.names) if name is None else self.names.index(name)

    def _repeated(self, count: int) -> Tensor:
        rows = len(self._adapter_of_row)
        times, rest = divmod(count, rows)
        if rest or not times:
            raise AdapterError(
                f"mix_adapters names the adapters of {rows} rows; a layer got a batch of {count}. If the model's batch "
                "has the right size, the layer gets something else, as where DeBERTa's share_att_key projects its "
                "positions: run each adapter's rows in a batch of their own, or leave this layer out of lora.targets"
            )
        return self._adapter_of_row.repeat_interleave(times)


Choice = str | BatchRouting | None  # an adapter, one for each row of a batch, or the bare base


class AdapterState:
    """The adapters of a model and which one runs. All LoRA layers and heads of the model share one state.

    `set_adapter` sets the global choice, `active_adapter`. `use_adapter` and `mix_adapters` override it in the current
    context only (a thread or an asyncio task), see `override`. Copies and pickles keep only the global choice.

    Attributes:
        active_adapter: the adapter that `set_adapter` chose, or None for the bare base.
        names: the adapters on the model, in the order they were added.
        labels: the labels of each adapter's head; under None those of the base's own head.
        merged: whether any layer may hold an adapter in its base weight.
    """

    _was_overridden = False  # until it is, no context is asked, which torch.compile cannot trace

    def __init__(self) -> None:
        self.active_adapter: str | None = None
        self.names: dict[str, None] = {}
        self.labels: dict[str | None, Labels] = {}
        self.merged = False

    @property
    def current(self) -> Choice:
        """What runs in this context."""
        return _overrides.get().get(self, self.active_adapter) if self._was_overridden else self.active_adapter

    @property
    def routing(self) -> BatchRouting | None:
        """The adapters of the rows of a batch, if this context runs more than one."""
        current = self.current
        return current if isinstance(current, BatchRouting) else None

    def active(self, adapters: Container[str]) -> str | None:
        """The adapter that runs in this context, if it is one of `adapters`; otherwise, and for a mix, None."""
        current = self.current
        return current if isinstance(current, str) and current in adapters else None

    @contextmanager
    def override(self, choice: Choice) -> Iterator[None]:
        """Overrides `active_adapter` with `choice` in this context. Other contexts are not affected."""
        self._was_overridden = True
        before = _overrides.get()
        _overrides.set(MappingProxyType({**before, self: choice}))
        try:
            yield
        finally:
            others = {state: other for state, other in _overrides.get().items() if state is not self}
            outer = {self: before[self]} if self in before else {}
            _overrides.set(MappingProxyType(others | outer))


# Not an attribute of the state: a copied or pickled model must not carry along what one thread has chosen.
_overrides: ContextVar[Mapping[AdapterState, Choice]] = ContextVar("lora_hf_adapters", default=MappingProxyType({}))
