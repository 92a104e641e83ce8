"""Attention of rows that are concatenated without padding between them.

On the CPU torch's flash kernel is the fastest where no gradients are taken, one row at a time. It does not help in
training: it has no dropout, and in bf16 its backward pass takes several times as long as the plain matrix products.
There, each long row is multiplied on its own, and several short ones together behind a mask. A GPU runs the kernel for
rows of any length, or where that lacks what a batch needs, such as dropout, torch's kernels for padded rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lora_hf.lora.host_batch import to_device
from lora_hf.lora.kernels.dropout import apply_mask, dropout_mask, round_dropout
from lora_hf.lora.kernels.varlen import varlen_kernel

# Rows of up to so many tokens together are multiplied in one product, to start fewer operators: as fast as 32, 96 and
# 128 or faster, at 10 to 100 tokens a row (measured with AVX2).
TOGETHER = 64
SAVED = 64  # weights of more tokens are computed again in the backward pass instead of saved


@dataclass(frozen=True)
class _Bin:
    """Consecutive rows that are multiplied together.

    Attributes:
        tokens: the number of their tokens.
        mask: `(tokens, tokens)` to add to the scores: minus infinity where a token does not see another, else 0. None
            if all see all.
    """

    tokens: int
    mask: Tensor | None


class Rows:
    """The rows of a batch, prepared once and used by every layer.

    `sees[i]`, if it is not None, is `(length, length)` and True if a token of row i sees another: row i is then a tree
    of causal rows with a common prefix. All other rows are taken to be causal if `sees` is given.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str = "cpu", sees: Sequence[Tensor | None] | None = None
    ) -> None:
        self.lengths = tuple(lengths)
        self.sees = sees
        self.device = torch.device(device)
        self.ends = to_device(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), self.device)
        self._bins: dict[tuple[int, bool, torch.dtype], list[_Bin]] = {}
        self._padded: dict[bool, tuple[Tensor, Tensor, Tensor | None]] = {}

    def bins(self, limit: int, is_causal: bool, dtype: torch.dtype) -> list[_Bin]:
        """Bins of at most `limit` tokens on the CPU; a longer row has one to itself."""
        key = (limit, is_causal, dtype)
        if key not in self._bins:
            parts: list[list[int]] = []
            for row, length in enumerate(self.lengths):
                if parts and sum(self.lengths[each] for each in parts[-1]) + length <= limit:
                    parts[-1].append(row)
                else:
                    parts.append([row])
            later = None
            if is_causal or self.sees is not None:
                longest = max(self.lengths)
                later = torch.full((longest, longest), -torch.inf, dtype=dtype).triu_(1)
            self._bins[key] = [self._bin(rows, later, dtype) for rows in parts]
        return self._bins[key]

    def padded(self, is_causal: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the rows lie if all are padded to the longest at their ends.

        Returns:
            The token at each of the `rows * longest` positions, a row's last one for padding, so that a NaN stays in
            its row; the position of each token; and which keys a query sees, `(rows, 1, 1 or longest, longest)`, or
            None if it sees the tokens before it, among which is no padding.
        """
        if is_causal not in self._padded:
            lengths, longest = torch.tensor(self.lengths)[:, None], max(self.lengths)
            positions = torch.arange(longest)
            real = positions < lengths
            source = positions.minimum(lengths - 1) + lengths.cumsum(0) - lengths
            seen = None if is_causal else real[:, None, None]
            if self.sees is not None:
                seen = torch.ones(len(lengths), 1, longest, longest, dtype=torch.bool).tril_()
                for row, sees in enumerate(self.sees):
                    if sees is not None:
                        seen[row, 0, : len(sees), : len(sees)] = sees
            target = real.flatten().nonzero()[:, 0]
            self._padded[is_causal] = (
                to_device(source.flatten(), self.device),
                to_device(target, self.device),
                None if seen is None else to_device(seen, self.device),
            )
        return self._padded[is_causal]

    def _bin(self, rows: list[int], later: Tensor | None, dtype: torch.dtype) -> _Bin:
        lengths = [self.lengths[row] for row in rows]
        trees = [self.sees[row] if self.sees is not None else None for row in rows]
        if trees == [None]:
            return _Bin(lengths[0], None if later is None else later[: lengths[0], : lengths[0]])
        mask = torch.full((sum(lengths), sum(lengths)), -torch.inf, dtype=dtype)
        for end, length, sees in zip(accumulate(lengths), lengths, trees, strict=True):
            block = mask[end - length : end, end - length : end]
            if sees is not None:
                block.masked_fill_(sees, 0)
            elif later is not None:
                block.copy_(later[:length, :length])
            else:
                block.zero_()
        return _Bin(sum(lengths), mask)


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
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotated q and k are in fp32 there, and the backward pass has no autocast
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return attend_rows(query.to(dtype), key.to(dtype), value.to(dtype), rows, scale, is_causal, dropout)
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
    if query.device.type != "cpu":
        return _attend_padded(query, key, value, rows, scale, is_causal, dropout)
    # Without gradients, a row with a NaN must not reach the others, and a weight of 0 does not stop it.
    bins = rows.bins(TOGETHER if torch.is_grad_enabled() else 0, is_causal, query.dtype)
    return _BinnedRows.apply(query, key, value, bins, scale, round_dropout(dropout))  # type: ignore[return-value]


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


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, is_causal: bool, dropout: float
) -> Tensor:
    """`attend_rows` by torch's kernels for padded rows."""
    source, target, mask = rows.padded(is_causal)
    heads, _, size = query.shape
    shape = (heads, len(rows.lengths), -1, size)
    q, k, v = (each.index_select(1, source).view(shape).transpose(0, 1) for each in (query, key, value))
    attended = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale)
    return attended.transpose(1, 2).reshape(-1, heads, size).index_select(0, target)


class _BinnedRows(torch.autograd.Function):
    """`(heads, tokens, head_dim)` each, and `(tokens, heads, head_dim)` for the output."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bins: list[_Bin], scale: float, dropout: float
    ) -> Tensor:
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        saved: list[Tensor | None] = []
        for each, q, k, v, out in _by_bin(bins, query, key, value, output.transpose(0, 1)):
            weights = _weights(q, k, each.mask, scale)
            keep = dropout_mask(weights.shape, dropout, q.device) if dropout else None
            dropped = weights if keep is None else apply_mask(weights, keep, dropout)
            out.copy_(torch.bmm(dropped, v))  # faster than `out=`, which is not contiguous
            saved += [weights if each.tokens <= SAVED else None, keep]
        ctx.save_for_backward(query, key, value, *saved)
        ctx.options = (bins, scale, dropout)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        bins, scale, dropout = ctx.options
        doutput = gradients[0].transpose(0, 1)
        results = [torch.empty_like(doutput) for _ in range(3)]
        parts = _by_bin(bins, query, key, value, doutput, *results)
        for number, (each, q, k, v, dout, dq, dk, dv) in enumerate(parts):
            weights, keep = saved[2 * number : 2 * number + 2]
            if weights is None:
                weights = _weights(q, k, each.mask, scale)
            dweights, dropped = torch.bmm(dout, v.transpose(1, 2)), weights
            if keep is not None:
                dweights.mul_(keep).mul_(1 / (1 - dropout))
                dropped = apply_mask(weights, keep, dropout)
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(scale)
            dq.copy_(torch.bmm(dscores, k))
            dk.copy_(torch.bmm(dscores.transpose(1, 2), q))
            dv.copy_(torch.bmm(dropped.transpose(1, 2), dout))
        return (*results, None, None, None)


def _by_bin(bins: list[_Bin], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each bin with its part of the tensors, which are `(heads, tokens, head_dim)`."""
    sizes = [each.tokens for each in bins]
    return zip(bins, *(tensor.split(sizes, 1) for tensor in tensors), strict=True)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`(heads, tokens, tokens)`: softmax over the keys that a token sees."""
    if mask is None:
        return torch.bmm(q, k.transpose(1, 2)).mul_(scale).softmax(-1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
