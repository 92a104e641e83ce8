"""Which adapter the layers of a model run: one for everybody, one for a thread, or one for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from lora_hf.core.errors import AdapterError

STATE_ATTRIBUTE = "lora_switch"  # the attribute of a base model that holds its Switch
Labels = tuple[tuple[str, ...], str | None]  # the names of the labels, and the problem type


@dataclass(frozen=True)
class Segments:
    """The `count` places of a batch in order of their adapters.

    `order` are the places adapter after adapter, those of the bare base last, or None where they already stand so;
    `ends[i]` is how many places come before the end of adapter i.
    """

    count: int
    order: torch.Tensor | None
    ends: tuple[int, ...]


class BatchRouting:
    """An adapter for each row of a batch; None is the bare base.

    Args:
        rows: the name of each row.
        stacks: of an earlier mixture on the same model, whose weights have not changed since.
        among: adapters that belong to the mixture whether a row names them or not.
        masked: as `lora_linear_parts`, where gradients are taken.

    Attributes:
        names: the different names in alphabetical order, without None.
        stacks: what each layer keeps of the weights of a set of adapters.
    """

    def __init__(
        self,
        rows: Sequence[str | None],
        stacks: dict[Any, Any] | None = None,
        among: Sequence[str] = (),
        masked: bool = False,
    ) -> None:
        self.masked = masked
        self.names = tuple(sorted({name for name in (*rows, *among) if name is not None}))
        numbers = {name: number for number, name in enumerate(self.names)}
        self.rows = torch.tensor([len(self.names) if name is None else numbers[name] for name in rows])
        self.tokens: Segments | None = None  # while a model runs without padding: of its tokens
        self.stacks = {} if stacks is None else stacks
        self._segments: dict[int, Segments] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def rows_of(self, name: str | None, count: int) -> torch.Tensor:
        """The rows of one adapter among `count`, which is a multiple of the mixture's rows in a beam search."""
        number = len(self.names) if name is None else self.names.index(name)
        return (self._repeated(count) == number).nonzero()[:, 0]

    def segments(self, count: int) -> Segments:
        """Of the rows of a batch: `count` of them, each repeated in a beam search."""
        if count not in self._segments:
            self._segments[count] = segments_of(self._repeated(count), len(self.names))
        return self._segments[count]

    def places(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Segments]:
        """Input and output of a layer with the mixture's places in front: rows, or tokens of rows without padding."""
        if self.tokens is not None and x.shape[:2] == (1, self.tokens.count):
            return x[0], y[0], self.tokens
        if self.tokens is not None and len(x) == 1:
            # BERT's pooler, given the first of all tokens: what it makes of it is thrown away, and made anew by row.
            return x, y, Segments(1, None, (0,) * len(self.names))
        return x, y, self.segments(len(x))

    def apply(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        change: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
        adapters: Container[str],
    ) -> torch.Tensor:
        """`y` with the places of each of `adapters` replaced by `change(name, x there, y there)`."""
        inputs, outputs, segments = self.places(x, y)
        changed, start = outputs.clone(), 0
        for name, end in zip(self.names, segments.ends, strict=True):
            if name in adapters and end > start:
                there = slice(start, end) if segments.order is None else segments.order[start:end]
                changed[there] = change(name, inputs[there], outputs[there])
            start = end
        return changed.view_as(y)

    def _repeated(self, count: int) -> torch.Tensor:
        times, rest = divmod(count, len(self))
        if rest or not times:
            raise AdapterError(f"a mixture of {len(self)} rows met a batch of {count}; name the adapter of each row")
        return self.rows.repeat_interleave(times)


def segments_of(numbers: torch.Tensor, adapters: int) -> Segments:
    """The segments of places by the number of each one's adapter; `adapters` itself numbers the bare base."""
    counts = torch.bincount(numbers, minlength=adapters + 1)[:adapters]
    in_order = bool((numbers.diff() >= 0).all())
    order = None if in_order else numbers.argsort(stable=True)
    return Segments(len(numbers), order, tuple(counts.cumsum(0).tolist()))


Choice = str | BatchRouting | None  # an adapter, one for each row of a batch, or the bare base


class AdapterState:
    """Which adapters a model has and which one runs; all LoRA layers and heads of the model share one state.

    `set_adapter` chooses for everyone (`active_adapter`). `use_adapter` and `mix_adapters` choose for the current
    context alone (a thread or an asyncio task), see `override`. Copies and pickles keep the first, not the second.

    Attributes:
        active_adapter: the adapter that `set_adapter` chose, or None for the bare base.
        names: the adapters on the model, in the order they were added.
        labels: the labels of each adapter's head; under None those of the base's own head.
        merged: whether any layer may hold an adapter in its base weight.
    """

    def __init__(self) -> None:
        self.active_adapter: str | None = None
        self.names: dict[str, None] = {}
        self.labels: dict[str | None, Labels] = {}
        self.merged = False

    @property
    def current(self) -> Choice:
        """What runs in this context."""
        return _overrides.get().get(self, self.active_adapter)

    @property
    def routing(self) -> BatchRouting | None:
        """The adapters of the rows of a batch, if this context runs more than one."""
        current = self.current
        return current if isinstance(current, BatchRouting) else None

    def active(self, adapters: Container[str]) -> str | None:
        """The one of `adapters` that runs in this context; None if another one, none or a mix runs."""
        current = self.current
        return current if isinstance(current, str) and current in adapters else None

    @contextmanager
    def override(self, choice: Choice) -> Iterator[None]:
        """Runs `choice` in this context, whatever `active_adapter` is; other contexts do not see it."""
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
