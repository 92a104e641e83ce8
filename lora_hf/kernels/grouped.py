"""The low-rank products of several adapters on the places of one batch: one computation for all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import grouped_mm


@dataclass(frozen=True)
class Stack:
    """The A and B of n adapters at one projection, padded with zeros to the largest rank.

    `lora_A` is `(in, n, r)` and `lora_B` `(n, r, out)`, the scaling in B; an adapter that leaves this projection alone
    is all zeros.
    """

    lora_A: torch.Tensor  # noqa: N815
    lora_B: torch.Tensor  # noqa: N815


def add_grouped(
    base_output: torch.Tensor,
    x: torch.Tensor,
    stack: Stack,
    order: torch.Tensor | None,
    ends: Sequence[int],
) -> torch.Tensor:
    """`base_output[p] + x[p] A_i B_i` for every place p of adapter i; places behind the last end are left as they are.

    Args:
        base_output: `(places, ..., out)`, what the frozen projection gave.
        x: `(places, ..., in)`.
        stack: of n adapters.
        order: `(places,)`, the places adapter after adapter; None where they stand so.
        ends: n numbers: how many places come before the end of each adapter.
    """
    inner, stop = x.shape[1:-1].numel(), ends[-1]
    if not stop:
        return base_output
    there = None if order is None else order[:stop].to(x.device)
    adapted = x[:stop] if there is None else x.index_select(0, there)
    rows = adapted.reshape(stop * inner, x.shape[-1])
    added = _low_rank(rows, stack, [end * inner for end in ends]).view(stop, *base_output.shape[1:])
    if there is not None:
        return base_output.index_add(0, there, added)
    if stop == len(x):
        return base_output + added
    return torch.cat([base_output[:stop] + added, base_output[stop:]])


def _low_rank(rows: torch.Tensor, stack: Stack, ends: list[int]) -> torch.Tensor:
    """`(rows, out)`: the rows up to `ends[0]` times A_0 B_0, those up to `ends[1]` times A_1 B_1, and so on."""
    width, adapters, r = stack.lora_A.shape
    # torch's grouped product is a loop on the CPU, and the fastest way in fp32. In half precision products so narrow
    # are slow, and one wide product of which each row keeps its own columns takes two thirds of the time.
    preferred = rows.dtype == (torch.bfloat16 if rows.is_cuda else torch.float32)
    if preferred and not torch.is_grad_enabled() and _has_grouped(rows.dtype, rows.device.type):
        offsets = torch.tensor(ends, dtype=torch.int32, device=rows.device)
        projected = grouped_mm(rows, stack.lora_A.transpose(0, 1), offs=offsets)
        return grouped_mm(projected, stack.lora_B, offs=offsets)
    counts = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)], device=rows.device)
    own = torch.arange(adapters, device=rows.device).repeat_interleave(counts)
    others = own[:, None] != torch.arange(adapters, device=rows.device).repeat_interleave(r)
    projected = (rows @ stack.lora_A.reshape(width, adapters * r)).masked_fill(others, 0)
    return projected @ stack.lora_B.reshape(adapters * r, -1)


@functools.cache
def _has_grouped(dtype: torch.dtype, device: str) -> bool:
    """Whether this torch multiplies groups in this precision: what it promises is bf16 on a GPU alone."""
    try:
        rows = torch.zeros(16, 16, dtype=dtype, device=device)
        grouped_mm(rows, rows[None], offs=torch.tensor([16], dtype=torch.int32, device=device))
    except (RuntimeError, ValueError):
        return False
    return True
