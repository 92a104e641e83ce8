"""The low-rank products of several adapters on the places of one batch: one computation for all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import grouped_mm

# In half precision products as narrow as one adapter's are slow: up to this sum of ranks one wide product, of which
# each row keeps its own columns, takes less time. In fp32 it never does.
WIDE = 256


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

    Where no gradient is taken, the sum is written over `base_output`: a tensor of its own for it would cost more than
    the products.

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
    last = tuple(end * inner for end in ends)
    if torch.is_grad_enabled():
        added = _wide(rows, stack, last).view(stop, *base_output.shape[1:])
        if there is not None:
            return base_output.index_add(0, there, added)
        return torch.cat([base_output[:stop] + added, base_output[stop:]])
    if there is None:
        _add(base_output[:stop].view(len(rows), -1), rows, stack, last)
        return base_output
    added = base_output.new_zeros(len(rows), base_output.shape[-1])
    _add(added, rows, stack, last)
    return base_output.index_add_(0, there, added.view(stop, *base_output.shape[1:]))


def _add(outputs: torch.Tensor, rows: torch.Tensor, stack: Stack, ends: tuple[int, ...]) -> None:
    """Adds to `(rows, out)`: the rows up to `ends[0]` times A_0 B_0, those up to `ends[1]` times A_1 B_1, and so on."""
    _, adapters, r = stack.lora_A.shape
    if rows.is_cuda and rows.dtype == torch.bfloat16 and _has_grouped():
        offsets = torch.tensor(ends, dtype=torch.int32, device=rows.device)
        projected = grouped_mm(rows, stack.lora_A.transpose(0, 1), offs=offsets)
        outputs += grouped_mm(projected, stack.lora_B, offs=offsets)
    elif rows.dtype != torch.float32 and adapters * r <= WIDE:
        projected = (rows @ stack.lora_A.flatten(1)).masked_fill_(_other_adapters_mask(ends, r, rows.device), 0)
        outputs.addmm_(projected, stack.lora_B.flatten(0, 1))
    else:
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            if end > start:
                outputs[start:end].addmm_(rows[start:end] @ stack.lora_A[:, number], stack.lora_B[number])


def _wide(rows: torch.Tensor, stack: Stack, ends: tuple[int, ...]) -> torch.Tensor:
    """`(rows, out)`: each row times all A at once; of what comes out it keeps its own columns."""
    r = stack.lora_A.shape[-1]
    projected = (rows @ stack.lora_A.flatten(1)).masked_fill(_other_adapters_mask(ends, r, rows.device), 0)
    return projected @ stack.lora_B.flatten(0, 1)


@functools.lru_cache(maxsize=16)
def _other_adapters_mask(ends: tuple[int, ...], r: int, device: torch.device) -> torch.Tensor:
    """`(rows, n * r)`: True at the columns of other adapters. Each projection of a model asks for the same."""
    with torch.inference_mode(False):  # or a backward pass that meets it again could not keep it
        counts = torch.tensor([end - start for start, end in zip((0, *ends), ends, strict=False)], device=device)
        numbers = torch.arange(len(ends), device=device)
        return numbers.repeat_interleave(counts)[:, None] != numbers.repeat_interleave(r)


@functools.cache
def _has_grouped() -> bool:
    """Whether this torch multiplies groups in bf16 on this GPU."""
    try:
        rows = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
        grouped_mm(rows, rows[None], offs=torch.tensor([16], dtype=torch.int32, device="cuda"))
    except (RuntimeError, ValueError):
        return False
    return True
