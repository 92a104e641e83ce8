"""Attention of rows that lie one after the other, without padding between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`softmax(scale * q k^T) v` within each row: no token sees another row.

    Args:
        query: `(heads, tokens, head_dim)`, the rows one after the other.
        key, value: `(key heads, tokens, head_dim)`; fewer key heads are each shared by a group of query heads.
        lengths: the tokens of each row.
        scale: `1 / sqrt(head_dim)` unless given.
        dropout: the share of attention weights that is dropped.

    Returns:
        `(tokens, heads, head_dim)`.
    """
    groups = query.shape[0] // key.shape[0]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    if query.is_cuda and dropout == 0 and query.dtype in (torch.bfloat16, torch.float16):
        return _attend_on_gpu(query, key, value, lengths, scale, is_causal)
    if query.device.type == "cpu" and dropout == 0 and query.dtype != torch.float64:
        return _RowsOnCpu.apply(query, key, value, tuple(lengths), scale, is_causal)  # type: ignore[return-value]
    return _attend_padded(query, key, value, lengths, scale, is_causal, dropout)


def _spans(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


class _RowsOnCpu(torch.autograd.Function):
    """torch's CPU flash kernel on each row: one autograd node a layer, where a call a row costs as much as the work."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...],
        scale: float | None, is_causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        heads, tokens, size = query.shape
        output = query.new_empty(tokens, heads, size)
        sums = []
        for span in _spans(lengths):
            row, logsumexp = _flash(
                query[None, :, span], key[None, :, span], value[None, :, span], 0.0, is_causal, scale=scale
            )
            output[span] = row[0].transpose(0, 1)
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.options = (lengths, scale, is_causal)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors
        lengths, scale, is_causal = ctx.options
        # Laid out as the projections' outputs are, (tokens, heads, head_dim): what reads them next needs no copy.
        made = [tensor.new_empty(tensor.shape[1], tensor.shape[0], tensor.shape[2]) for tensor in (query, key, value)]
        for span, logsumexp in zip(_spans(lengths), sums, strict=True):
            row = _flash_backward(
                gradients[0][None, span].transpose(1, 2),
                *(tensor[None, :, span] for tensor in (query, key, value)),
                output[None, span].transpose(1, 2), logsumexp, 0.0, is_causal, scale=scale,
            )  # fmt: skip
            for whole, part in zip(made, row, strict=True):
                whole[span] = part[0].transpose(0, 1)
        return (*(tensor.transpose(0, 1) for tensor in made), None, None, None)


def _attend_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float | None,
    is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    longest = max(lengths)
    parts = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
    window = (-1, 0 if is_causal else -1)
    return varlen_attn(*parts, ends, ends, longest, longest, scale=scale, window_size=window)  # type: ignore[return-value]


def _attend_padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float | None,
    is_causal: bool, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """The same through padded rows: the only form in which torch drops attention weights."""
    rows = [
        pad_sequence(list(tensor.transpose(0, 1).split(list(lengths))), batch_first=True).transpose(1, 2)
        for tensor in (query, key, value)
    ]
    places = torch.arange(max(lengths), device=query.device)
    inside = places < torch.tensor(lengths, device=query.device)[:, None]
    mask = inside[:, None, None, :]
    if is_causal:
        mask = mask & (places[:, None] >= places)
    padded = scaled_dot_product_attention(*rows, attn_mask=mask, dropout_p=dropout, scale=scale)
    return padded.transpose(1, 2)[inside]
