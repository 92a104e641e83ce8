"""Keys and values of rows that join and leave a running batch."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

HEADROOM = 128  # columns to allocate beyond those in use, so that few steps have to copy


class RowCache(Cache):
    """A cache whose rows end in the same column, as in a batch padded in front.

    The columns in use are `start` to `end`; a row of `n` tokens uses the last `n` of them. What stands before it is
    masked, but must be finite: a masked NaN is still a NaN in the sum.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=partial(RowLayer, self))  # type: ignore[arg-type]
        self.rows = self.start = self.end = 0

    @property
    def width(self) -> int:
        return self.end - self.start

    def join(self, rows: DynamicCache, count: int) -> None:
        """Adds `count` rows, whose prompts a forward pass has written to another cache."""
        width = rows.get_seq_length()
        while len(self.layers) < len(rows.layers):
            self.layers.append(RowLayer(self))
        fits = self.layers[0].holds(self.rows + count) and width <= self.end  # type: ignore[union-attr]
        if not fits:
            self._reallocate(self.rows + count, max(self.width, width), rows)
        for layer, source in zip(self.layers, rows.layers, strict=True):
            layer.write_rows(source.keys, source.values)  # type: ignore[union-attr]
        self.start = min(self.start, self.end - width)
        self.rows += count

    def keep(self, rows: list[int], width: int) -> None:
        """Keeps only these rows, in this order; the longest has `width` tokens."""
        if rows != list(range(len(rows))):
            for layer in self.layers:
                layer.select(rows)  # type: ignore[union-attr]
        self.rows, self.start = len(rows), self.end - width
        if not rows:
            self.layers.clear()
            self.start = self.end = 0

    def make_room(self) -> None:
        """Makes sure that a column is free for the next token of each row."""
        if self.layers and self.end == self.layers[0].columns:  # type: ignore[union-attr]
            self._reallocate(self.rows, self.width)

    def advance(self) -> None:
        """Counts the column that a forward pass has written."""
        self.end += 1

    def _reallocate(self, rows: int, width: int, like: DynamicCache | None = None) -> None:
        for index, layer in enumerate(self.layers):
            source: Any = like.layers[index] if like else None
            states = [source.keys, source.values] if source else layer.buffers  # type: ignore[union-attr]
            layer.reallocate(rows, width, states)  # type: ignore[union-attr]
        self.start, self.end = width - self.width, width


class RowLayer(DynamicLayer):
    """The keys and values of one layer: a view of the first rows and the columns in use of a larger buffer."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache
        self.buffers: list[Tensor] = []

    @property
    def columns(self) -> int:
        return self.buffers[0].shape[2] if self.buffers else 0

    def holds(self, rows: int) -> bool:
        return bool(self.buffers) and rows <= len(self.buffers[0])

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end, rows = self.cache.start, self.cache.end, self.cache.rows
        views = []
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, end] = states[:, :, 0]
            views.append(buffer[:rows, :, start : end + 1])
        return views[0], views[1]

    def reallocate(self, rows: int, width: int, states: list[Tensor]) -> None:
        """Moves the rows to buffers like `states` for `rows` of them, which end in column `width`."""
        start, end, used = self.cache.start, self.cache.end, self.cache.rows
        before, self.buffers = self.buffers, []
        for index, like in enumerate(states):
            buffer = like.new_zeros(rows, like.shape[1], width + HEADROOM, like.shape[3])
            if used:
                buffer[:used, :, width - (end - start) : width] = before[index][:used, :, start:end]
            self.buffers.append(buffer)

    def write_rows(self, keys: Tensor, values: Tensor) -> None:
        """Writes further rows after those in use, and zeros before them."""
        first, end = self.cache.rows, self.cache.end
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            rows = buffer[first : first + len(states)]
            rows[:, :, : end - states.shape[2]] = 0
            rows[:, :, end - states.shape[2] : end] = states

    def select(self, rows: list[int]) -> None:
        for buffer in self.buffers:
            for target, source in enumerate(rows):
                if target != source:
                    buffer[target, :, : self.cache.end] = buffer[source, :, : self.cache.end]
