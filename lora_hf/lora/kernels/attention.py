"""Attention of rows that are concatenated without padding between them.

On the CPU torch's flash kernel is the fastest where no gradients are taken, one row at a time. It does not help in
training: it has no dropout, and in bf16 its backward pass takes several times as long as the plain matrix products.
There, rows of similar length are multiplied together, group by group, or if the batch is small all tokens at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_hf.lora.host_batch import to_device
from lora_hf.lora.kernels.dropout import apply_mask, drop, dropout_mask, round_dropout
from lora_hf.lora.kernels.varlen import varlen_kernel

SIMILAR = 0.6  # rows of at least this share of the longest in their group are padded to it
# Up to so many tokens, products of all with all take less time than gathering groups (measured with AVX2: 1.1 to 1.8x).
AT_ONCE = 128


@dataclass(frozen=True)
class _Group:
    """Rows of similar length, padded to the longest of them.

    Attributes:
        index: `(rows, length)`, the token at each position; the row's last one for padding.
        padding: `(rows, length)`, True for padding; None if there is none.
        unseen: `(rows, length, length)`, True if a token does not see another; None if `is_causal` decides.
    """

    index: Tensor
    length: int
    padding: Tensor | None
    unseen: Tensor | None


class Rows:
    """The rows of a batch of `tokens`, prepared once and used by every layer.

    `sees[i]`, if it is not None, is `(length, length)` and True if a token of row i sees another: row i is then a tree
    of causal rows with a common prefix. All other rows are taken to be causal if `sees` is given.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str = "cpu", sees: Sequence[Tensor | None] | None = None
    ) -> None:
        self.lengths = tuple(lengths)
        self.sees = sees
        self.device = torch.device(device)
        self.tokens = sum(self.lengths)
        self.ends = to_device(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), self.device)
        self._indices: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._masks: dict[tuple[bool, torch.dtype], Tensor] = {}

    @functools.cached_property
    def groups(self) -> list[_Group]:
        parts: list[list[int]] = []
        for row in sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row]):
            if not parts or self.lengths[row] < SIMILAR * self.lengths[parts[-1][0]]:
                parts.append([])
            parts[-1].append(row)
        starts, lengths = torch.tensor([0, *accumulate(self.lengths)]), torch.tensor(self.lengths)
        groups = []
        for rows in parts:
            length = self.lengths[rows[0]]
            positions = torch.arange(length)
            padding = positions >= lengths[rows][:, None]
            # A token of another row would bring its NaN along: a weight of 0 does not remove it.
            index = positions.minimum(lengths[rows][:, None] - 1) + starts[rows][:, None]
            any_padding = to_device(padding, self.device) if bool(padding.any()) else None
            groups.append(_Group(to_device(index, self.device), length, any_padding, self._unseen(rows, length)))
        return groups

    def _unseen(self, rows: list[int], length: int) -> Tensor | None:
        if self.sees is None:
            return None
        unseen = torch.ones(length, length, dtype=torch.bool).triu_(1).repeat(len(rows), 1, 1)
        for number, row in enumerate(rows):
            if (sees := self.sees[row]) is not None:
                unseen[number, : len(sees), : len(sees)] = ~sees
        return to_device(unseen, self.device)

    def other_rows(self, is_causal: bool, dtype: torch.dtype) -> Tensor:
        """`(tokens, tokens)` to add to the scores: minus infinity where a token does not see another, else 0."""
        key = (is_causal, dtype)
        if key not in self._masks:
            row = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
            unseen = row[:, None] != row
            if is_causal:
                unseen |= torch.ones_like(unseen).triu_(1)
            mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
            self._masks[key] = to_device(mask, self.device)
        return self._masks[key]

    def indices(self, heads: int) -> list[tuple[Tensor, Tensor]]:
        """For each group the source and the target of its `(rows, heads, length)` vectors among `tokens * heads`.

        Padding reads the row's last token, and writes after the last of all.
        """
        if heads not in self._indices:
            self._indices[heads] = []
            for group in self.groups:
                source = group.index[:, None] * heads + torch.arange(heads, device=self.device)[:, None]
                target = source
                if group.padding is not None:
                    target = source.masked_fill(group.padding[:, None], self.tokens * heads)
                self._indices[heads].append((source.flatten(), target.flatten()))
        return self._indices[heads]


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    scale: float | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`softmax(scale * q k^T) v` within each row: no token sees another row.

    Args:
        query: `(heads, tokens, head_dim)`, the rows concatenated.
        key, value: `(key heads, tokens, head_dim)`; if there are fewer key heads, a group of query heads shares each.
        scale: `1 / sqrt(head_dim)` by default.
        dropout: the probability with which an attention weight is dropped, rounded to a multiple of 2^-16.

    Returns:
        `(tokens, heads, head_dim)`.
    """
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    shared = query.shape[0] // key.shape[0]
    if _can_attend_one_by_one(query, key, rows, dropout):
        return _attend_one_by_one(query, key, value, rows, scale, is_causal)
    kernel = varlen_kernel(query.transpose(0, 1), dropout) if rows.sees is None else None
    if kernel is not None:
        query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
        return kernel(query, key, value, rows.ends, max(rows.lengths), scale, is_causal, dropout)
    if shared > 1:
        key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    # Without gradients a row with a NaN must not reach the others, as a weight of 0 does not stop it.
    if rows.tokens <= AT_ONCE and rows.sees is None and torch.is_grad_enabled():
        return _attend_at_once(query, key, value, rows, scale, is_causal, dropout)
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return _GroupedRows.apply(query, key, value, rows, scale, is_causal, round_dropout(dropout))  # type: ignore[return-value]


def _can_attend_one_by_one(query: Tensor, key: Tensor, rows: Rows, dropout: float) -> bool:
    if torch.is_grad_enabled() or dropout or rows.sees is not None:
        return False
    if query.device.type != "cpu" or query.dtype != torch.float32:  # half precision is not measured
        return False
    return bool(key.sum().isfinite())  # where all keys are NaN, the flash kernel returns zeros


def _attend_one_by_one(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, is_causal: bool) -> Tensor:
    """`attend_rows` by the flash kernel, without a copy of the inputs."""
    heads, tokens, size = query.shape
    output = query.new_empty(tokens, heads, size)
    for q, k, v, row in zip(
        *(tensor.split(rows.lengths, 1) for tensor in (query, key, value)), output.split(rows.lengths), strict=True
    ):
        attended = scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=is_causal, scale=scale, enable_gqa=len(q) != len(k)
        )
        row.copy_(attended[0].transpose(0, 1))
    return output


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, is_causal: bool, dropout: float
) -> Tensor:
    """`attend_rows` by products of all tokens with all tokens, of which a mask keeps those within a row."""
    others = rows.other_rows(is_causal, query.dtype)
    weights = torch.baddbmm(others, query, key.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(drop(weights, dropout), value).transpose(0, 1)


class _GroupedRows(torch.autograd.Function):
    """`(tokens, heads, head_dim)` each; weights of rows longer than head_dim are computed again, not saved."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Rows,
        scale: float,
        is_causal: bool,
        dropout: float,
    ) -> Tensor:
        tokens, heads, size = query.shape
        output = query.new_empty(tokens * heads + 1, size)
        saved: list[Tensor | None] = []
        for group, (source, target) in zip(rows.groups, rows.indices(heads), strict=True):
            q, k, v = (_gather(tensor, source, group.length) for tensor in (query, key, value))
            weights = _weights(q.mul_(scale), k, group, is_causal)
            keep = dropout_mask(weights.shape, dropout, q.device) if dropout else None
            dropped = weights if keep is None else apply_mask(weights, keep, dropout)
            output.index_copy_(0, target, torch.bmm(dropped, v).view(-1, size))
            saved += [weights if group.length <= size else None, keep]
        ctx.save_for_backward(query, key, value, *saved)
        ctx.options = (rows, scale, is_causal, dropout)
        return output[:-1].view(tokens, heads, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        rows, scale, is_causal, dropout = ctx.options
        tokens, heads, size = query.shape
        results = [query.new_empty(tokens * heads + 1, size) for _ in range(3)]
        for number, (group, (source, target)) in enumerate(zip(rows.groups, rows.indices(heads), strict=True)):
            weights, keep = saved[2 * number : 2 * number + 2]
            q, k, v, doutput = (_gather(t, source, group.length) for t in (query, key, value, gradients[0]))
            q.mul_(scale)
            if weights is None:
                weights = _weights(q, k, group, is_causal)
            dweights, dropped = torch.bmm(doutput, v.transpose(1, 2)), weights
            if keep is not None:
                dweights.mul_(keep).mul_(1 / (1 - dropout))
                dropped = apply_mask(weights, keep, dropout)
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            parts = (
                torch.bmm(dscores, k).mul_(scale),
                torch.bmm(dscores.transpose(1, 2), q),
                torch.bmm(dropped.transpose(1, 2), doutput),
            )
            for result, part in zip(results, parts, strict=True):
                result.index_copy_(0, target, part.view(-1, size))
        return (*(result[:-1].view(tokens, heads, size) for result in results), None, None, None, None)


def _gather(tensor: Tensor, source: Tensor, length: int) -> Tensor:
    """`(rows * heads, length, head_dim)` from `(tokens, heads, head_dim)`."""
    return tensor.reshape(-1, tensor.shape[-1]).index_select(0, source).view(-1, length, tensor.shape[-1])


def _weights(q: Tensor, k: Tensor, group: _Group, is_causal: bool) -> Tensor:
    """`(rows * heads, length, length)`: softmax over the keys of a row; zeros for queries that are padding."""
    scores = torch.bmm(q, k.transpose(1, 2))
    by_row = scores.view(len(group.index), -1, group.length, group.length)
    if group.unseen is not None:
        by_row.masked_fill_(group.unseen[:, None], -torch.inf)
    elif is_causal:
        later = torch.ones(group.length, group.length, dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    if group.padding is None:
        return scores.softmax(-1)
    by_row.masked_fill_(group.padding[:, None, None, :], -torch.inf)
    weights = by_row.softmax(-1)
    # Zero rows keep the garbage of the padding out of every gradient.
    return weights.masked_fill_(group.padding[:, None, :, None], 0).view_as(scores)
