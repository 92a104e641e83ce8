"""The low-rank products of several adapters on the items of one batch, in one computation.

An item is a row of the batch, or a token if the model runs without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from lora_hf.lora.host_batch import to_device

# In half precision products as narrow as one adapter's are slow. Up to this sum of ranks one wide product, of which
# each row keeps its own columns, takes less time. In fp32 it never does.
WIDE = 256


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stack:
    """The A `(in, r)` and B `(r, out)` of n adapters at one projection, the scaling included in B.

    None is an adapter that does not adapt this projection.
    """

    pairs: tuple[Pair | None, ...]

    @functools.cached_property
    def rank(self) -> int:
        """The largest rank; a grouped product needs rows of 16 bytes."""
        largest = max(pair[0].shape[1] for pair in self.pairs if pair is not None)
        return largest + -largest % 8

    @functools.cached_property
    def wide(self) -> Pair:
        """`(in, n, r)` and `(n, r, out)`, padded with zeros to one rank."""
        a, b = next(pair for pair in self.pairs if pair is not None)
        lora_a = a.new_zeros(len(a), len(self.pairs), self.rank)
        lora_b = b.new_zeros(len(self.pairs), self.rank, b.shape[1])
        for number, pair in enumerate(self.pairs):
            if pair is not None:
                a, b = pair
                lora_a[:, number, : a.shape[1]], lora_b[number, : len(b)] = a, b
        return lora_a, lora_b


def add_grouped(base_output: Tensor, x: Tensor, stack: Stack, order: Tensor | None, ends: Sequence[int]) -> Tensor:
    """`base_output[i] + x[i] A_n B_n` for every item i of adapter n; items after the last end keep `base_output`.

    The sum is written into `base_output`, so no gradients can be taken: a new tensor would cost more than the products.

    Args:
        base_output: `(items, ..., out)`, the output of the frozen projection.
        x: `(items, ..., in)`.
        stack: the weights of n adapters.
        order: `(items,)`, the indices that sort the items by adapter; None if they are sorted.
        ends: for each adapter the number of sorted items up to its end.
    """
    inner, stop = x.shape[1:-1].numel(), ends[-1]
    if not stop:
        return base_output
    items = None if order is None else to_device(order[:stop], x.device)
    adapted = x[:stop] if items is None else x.index_select(0, items)
    rows = adapted.reshape(stop * inner, x.shape[-1])
    row_ends = tuple(end * inner for end in ends)
    if items is None:
        _add(base_output[:stop].view(len(rows), -1), rows, stack, row_ends)
        return base_output
    added = base_output.new_zeros(len(rows), base_output.shape[-1])
    _add(added, rows, stack, row_ends)
    return base_output.index_add_(0, items, added.view(stop, *base_output.shape[1:]))


def _add(outputs: Tensor, rows: Tensor, stack: Stack, ends: tuple[int, ...]) -> None:
    """Adds to `(rows, out)` the rows up to `ends[0]` times A_0 B_0, those up to `ends[1]` times A_1 B_1, and so on."""
    if rows.is_cuda and rows.dtype == torch.bfloat16 and _has_grouped():
        lora_a, lora_b = stack.wide
        offsets = _offsets(ends, rows.device)
        outputs += grouped_mm(grouped_mm(rows, lora_a.transpose(0, 1), offs=offsets), lora_b, offs=offsets)
    elif rows.dtype != torch.float32 and len(stack.pairs) * stack.rank <= WIDE:
        lora_a, lora_b = stack.wide
        mask = _other_adapters_mask(ends, stack.rank, rows.device)
        outputs.addmm_((rows @ lora_a.flatten(1)).masked_fill_(mask, 0), lora_b.flatten(0, 1))
    else:
        for pair, start, end in zip(stack.pairs, (0, *ends), ends, strict=False):
            if pair is not None and end > start:
                outputs[start:end].addmm_(rows[start:end] @ pair[0], pair[1])


@functools.lru_cache(maxsize=16)  # the projections of a model use the same
def _offsets(ends: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(ends, dtype=torch.int32), device)


@functools.lru_cache(maxsize=16)
def _other_adapters_mask(ends: tuple[int, ...], r: int, device: torch.device) -> Tensor:
    """`(rows, n * r)`: True at the columns of other adapters."""
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
