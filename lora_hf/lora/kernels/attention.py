"""Attention of rows that lie one after the other, without padding between them.

On the CPU torch's flash kernel is no help: in bf16 its backward takes several times as long as the plain matrix
products. Rows of like length are multiplied together instead, group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

LIKE = 0.6  # rows of at least this share of the longest of their group are padded to it


@dataclass(frozen=True)
class _Group:
    """Rows of like length, the length they are padded to, where they are padded, and what stays unseen."""

    index: torch.Tensor  # (rows, length): the token at each place, 0 where there is none
    length: int
    outside: torch.Tensor | None  # (rows, length): True where there is no token; None where there is none such
    unseen: torch.Tensor | None  # (rows, length, length): True where a token does not see another; None: by is_causal


class Rows:
    """The rows of a batch of `tokens`, made once and used by every layer.

    `sees[i]`, where it is not None, is `(length, length)` and True where a token of row i sees another of it: a tree of
    several causal rows that begin alike. Other rows are then taken to be causal.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        sees: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.sees = sees
        self.device = torch.device(device)
        self.tokens = sum(self.lengths)
        self.ends = torch.tensor([0, *self.lengths], device=device).cumsum(0).int()
        self.groups = self._grouped()
        self._indices: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def _grouped(self) -> list[_Group]:
        order = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])
        parts: list[list[int]] = []
        for row in order:
            longest = self.lengths[parts[-1][0]] if parts else 0
            if self.lengths[row] < LIKE * longest or not parts:
                parts.append([])
            parts[-1].append(row)
        starts = self.ends.tolist()
        groups = []
        for rows in parts:
            length = self.lengths[rows[0]]
            places = torch.arange(length)
            outside = places >= torch.tensor([self.lengths[row] for row in rows])[:, None]
            index = (places + torch.tensor([starts[row] for row in rows])[:, None]).masked_fill(outside, 0)
            ragged = outside.to(self.device) if bool(outside.any()) else None
            groups.append(_Group(index.to(self.device), length, ragged, self._unseen(rows, length)))
        return groups

    def _unseen(self, rows: list[int], length: int) -> torch.Tensor | None:
        if self.sees is None:
            return None
        unseen = torch.ones(length, length, dtype=torch.bool).triu_(1).repeat(len(rows), 1, 1)
        for number, row in enumerate(rows):
            if (sees := self.sees[row]) is not None:
                unseen[number, : len(sees), : len(sees)] = ~sees
        return unseen.to(self.device)

    def indices(self, heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each group where its `(rows, heads, length)` vectors are taken from and put back, among `tokens * heads`.

        What is padding is taken from the first token and put behind the last.
        """
        if heads not in self._indices:
            made = []
            for group in self.groups:
                head = torch.arange(heads, device=self.device)[:, None]
                taken = group.index[:, None] * heads + head
                put = taken
                if group.outside is not None:
                    put = taken.masked_fill(group.outside[:, None], self.tokens * heads)
                made.append((taken.flatten(), put.flatten()))
            self._indices[heads] = made
        return self._indices[heads]


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    scale: float | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`softmax(scale * q k^T) v` within each row: no token sees another row.

    Args:
        query: `(heads, tokens, head_dim)`, the rows one after the other.
        key, value: `(key heads, tokens, head_dim)`; fewer key heads are each shared by a group of query heads.
        scale: `1 / sqrt(head_dim)` unless given.
        dropout: the share of attention weights that is dropped.

    Returns:
        `(tokens, heads, head_dim)`.
    """
    shared = query.shape[0] // key.shape[0]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if query.is_cuda and dropout == 0 and rows.sees is None and query.dtype in (torch.bfloat16, torch.float16):
        return _attend_on_gpu(query, key, value, rows, scale, is_causal)
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    if dropout == 0:
        return _GroupedRows.apply(query, key, value, rows, scale, is_causal)  # type: ignore[return-value]
    return _attend_row_by_row(query, key, value, rows, scale, is_causal, dropout)


class _GroupedRows(torch.autograd.Function):
    """`(tokens, heads, head_dim)` each; the weights of a row no longer than head_dim are kept, others made again."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float,
        is_causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        tokens, heads, size = query.shape
        output = query.new_empty(tokens * heads + 1, size)
        kept: list[torch.Tensor | None] = []
        for group, (taken, put) in zip(rows.groups, rows.indices(heads), strict=True):
            q, k, v = (_take(tensor, taken, group.length) for tensor in (query, key, value))
            weights = _weights(q.mul_(scale), k, group, is_causal)
            output.index_copy_(0, put, torch.bmm(weights, v).view(-1, size))
            kept.append(weights if group.length <= size else None)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.options = (rows, scale, is_causal)
        return output[:-1].view(tokens, heads, size)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        rows, scale, is_causal = ctx.options
        tokens, heads, size = query.shape
        made = [query.new_empty(tokens * heads + 1, size) for _ in range(3)]
        for group, (taken, put), weights in zip(rows.groups, rows.indices(heads), kept, strict=True):
            q, k, v, upstream = (_take(t, taken, group.length) for t in (query, key, value, gradients[0]))
            q.mul_(scale)
            if weights is None:
                weights = _weights(q, k, group, is_causal)
            slope = torch.bmm(upstream, v.transpose(1, 2))
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            parts = (
                torch.bmm(slope, k).mul_(scale),
                torch.bmm(slope.transpose(1, 2), q),
                torch.bmm(weights.transpose(1, 2), upstream),
            )
            for whole, part in zip(made, parts, strict=True):
                whole.index_copy_(0, put, part.view(-1, size))
        return (*(whole[:-1].view(tokens, heads, size) for whole in made), None, None, None)


def _take(tensor: torch.Tensor, taken: torch.Tensor, length: int) -> torch.Tensor:
    """`(rows * heads, length, head_dim)` from `(tokens, heads, head_dim)`."""
    return tensor.reshape(-1, tensor.shape[-1]).index_select(0, taken).view(-1, length, tensor.shape[-1])


def _weights(q: torch.Tensor, k: torch.Tensor, group: _Group, is_causal: bool) -> torch.Tensor:
    """`(rows * heads, length, length)`: softmax over the keys of a row; zeros for queries that are padding."""
    scores = torch.bmm(q, k.transpose(1, 2))
    by_row = scores.view(len(group.index), -1, group.length, group.length)
    if group.unseen is not None:
        by_row.masked_fill_(group.unseen[:, None], -torch.inf)
    elif is_causal:
        hidden = torch.ones(group.length, group.length, dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, -torch.inf)
    if group.outside is None:
        return scores.softmax(-1)
    by_row.masked_fill_(group.outside[:, None, None, :], -torch.inf)
    weights = by_row.softmax(-1)
    # Zero rows keep the padding's garbage out of every gradient.
    return weights.masked_fill_(group.outside[:, None, :, None], 0).view_as(scores)


def _attend_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float, is_causal: bool
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
    window, longest = (-1, 0 if is_causal else -1), max(rows.lengths)
    return varlen_attn(  # type: ignore[return-value]
        q, k, v, rows.ends, rows.ends, longest, longest, scale=scale, window_size=window
    )


def _attend_row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scale: float, is_causal: bool,
    dropout: float,
) -> torch.Tensor:  # fmt: skip
    """Row by row through torch's own attention, the only one that drops attention weights."""
    made = []
    by_row = (tensor.transpose(0, 1).split(list(rows.lengths), 1) for tensor in (query, key, value))
    for row, (q, k, v) in enumerate(zip(*by_row, strict=True)):
        sees = None if rows.sees is None else rows.sees[row]
        if sees is not None:
            sees = sees.to(q.device)
        made.append(scaled_dot_product_attention(q, k, v, sees, dropout, is_causal and sees is None, scale=scale))
    return torch.cat(made, 1).transpose(0, 1)
