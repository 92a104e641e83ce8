"""Which adapter the layers of a model run: one for everybody, one for a thread, or one for each row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


class AdapterState:
    """The choice that all LoRA layers and heads of one model share.

    Attributes:
        names: the adapters on the model, in the order they came.
        labels: of the head of each adapter, and under None of the base's own.
        merged: whether a layer may hold an adapter in its base weight.
    """

    def __init__(self) -> None:
        self.shared: str | None = None
        self.names: dict[str, None] = {}
        self.labels: dict[str | None, Labels] = {}
        self.merged = False
        self._own = threading.local()

    @property
    def choice(self) -> str | BatchRouting | None:
        """What this thread runs."""
        return getattr(self._own, "choice", self.shared)

    @property
    def mixture(self) -> BatchRouting | None:
        """The mixture that this thread runs, if it runs one."""
        choice = self.choice
        return choice if isinstance(choice, BatchRouting) else None

    def active(self, adapters: Container[str]) -> str | None:
        """The one of `adapters` that this thread runs; None where it runs another, none or a mixture."""
        choice = self.choice
        return choice if isinstance(choice, str) and choice in adapters else None

    @contextmanager
    def own(self, choice: str | BatchRouting | None) -> Iterator[None]:
        """Makes this thread run `choice` inside, whatever others run."""
        before = vars(self._own).copy()
        self._own.choice = choice
        try:
            yield
        finally:
            vars(self._own).clear()
            vars(self._own).update(before)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterState:
        copied = memo[id(self)] = AdapterState()
        copied.shared, copied.merged = self.shared, self.merged
        copied.names, copied.labels = dict(self.names), dict(self.labels)
        return copied
