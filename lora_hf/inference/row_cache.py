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

    The `width` columns before a layer's `end` are in use; a row of `n` tokens uses the last `n` of them. What stands
    before it is masked, but must be finite: a masked NaN is still a NaN in the sum.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=partial(RowLayer, self))  # type: ignore[arg-type]
        self.rows = self.width = 0

    def join(self, rows: DynamicCache, count: int) -> None:
        """Adds `count` rows, whose prompts a forward pass has written to another cache.

        Without memory for them the rows in the cache stay as they are.
        """
        width = max(self.width, rows.get_seq_length())
        while len(self.layers) < len(rows.layers):
            self.layers.append(RowLayer(self))
        pairs: list[tuple[Any, Any]] = list(zip(self.layers, rows.layers, strict=True))
        for layer, source in pairs:
            layer.make_room(self.rows + count, width, [source.keys, source.values])
        for layer, source in pairs:
            layer.write_rows(source.keys, source.values)
        self.width = width
        self.rows += count

    def keep(self, rows: list[int], width: int) -> None:
        """Keeps only these rows, in this order; the longest has `width` tokens."""
        if rows != list(range(len(rows))):
            for layer in self.layers:
                layer.select(rows)  # type: ignore[union-attr]
        self.rows, self.width = len(rows), width
        if not rows:
            self.layers.clear()

    def make_room(self) -> None:
        """Makes sure that a column is free for the next token of each row."""
        for layer in self.layers:
            layer.make_room(self.rows, self.width, layer.buffers)  # type: ignore[union-attr]

    def advance(self) -> None:
        """Counts the column that a forward pass has written."""
        self.width += 1
        for layer in self.layers:
            layer.end += 1  # type: ignore[union-attr]


class RowLayer(DynamicLayer):
    """The keys and values of one layer: a view of the first rows and the columns in use of a larger buffer.

    Each layer has its own `end`, so that it can move to a larger buffer alone: if memory runs out in between, the
    layers still hold the same rows.
    """

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache
        self.buffers: list[Tensor] = []
        self.end = 0

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end, rows = self.end - self.cache.width, self.end, self.cache.rows
        views = []
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, end] = states[:, :, 0]
            views.append(buffer[:rows, :, start : end + 1])
        return views[0], views[1]

    def make_room(self, rows: int, width: int, states: list[Tensor]) -> None:
        """Makes sure that `rows` rows of up to `width` tokens fit, and one more token of each.

        Args:
            states: tensors like the buffers, except for the number of rows and columns.
        """
        if self.buffers and rows <= len(self.buffers[0]) and width <= self.end < self.buffers[0].shape[2]:
            return
        used, held = self.cache.rows, self.cache.width
        buffers = []
        for index, like in enumerate(states):
            buffer = like.new_zeros(rows, like.shape[1], width + HEADROOM, like.shape[3])
            if used:
                buffer[:used, :, width - held : width] = self.buffers[index][:used, :, self.end - held : self.end]
            buffers.append(buffer)
        self.buffers, self.end = buffers, width

    def write_rows(self, keys: Tensor, values: Tensor) -> None:
        """Writes further rows after those in use, and zeros before them."""
        first, end = self.cache.rows, self.end
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            rows = buffer[first : first + len(states)]
            rows[:, :, : end - states.shape[2]] = 0
            rows[:, :, end - states.shape[2] : end] = states

    def select(self, rows: list[int]) -> None:
        for buffer in self.buffers:
            for target, source in enumerate(rows):
                if target != source:
                    buffer[target, :, : self.end] = buffer[source, :, : self.end]
