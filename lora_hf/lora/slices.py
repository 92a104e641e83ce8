"""The slices of a projection: which rows of the stacked A and B belong to which columns of the output.

An adapter of a fused projection (GPT-2's q, k and v) has its own A and B for each slice of the output. `lora_A` is
`(n * r, in)` and `lora_B` `(sum of slice widths, r)`: those of the n slices stacked.

A slice is `(start, stop)`, or `(start, stop, width, step)` where a projection interleaves its roles by head: the first
`width` of every `step` columns from `start` to `stop`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_hf.lora.host_batch import to_device

Slice = tuple[int, ...]
Slices = Sequence[Slice]


def slice_width(piece: Slice) -> int:
    """The number of columns of a slice."""
    if len(piece) == 2:
        return piece[1] - piece[0]
    start, stop, width, step = piece
    return (stop - start) // step * width + min((stop - start) % step, width)


def slice_columns(piece: Slice, device: torch.device | str = "cpu") -> slice | Tensor:
    """What indexes the columns of a slice, or the same rows of an `(out, in)` weight, in tensors of a device."""
    return slice(*piece) if len(piece) == 2 else column_indices(piece, device)


@functools.lru_cache(maxsize=64)  # a projection needs them several times in a step
@torch.inference_mode(False)  # else a backward pass could not use them
def column_indices(piece: Slice, device: torch.device | str = "cpu") -> Tensor:
    """The indices of the columns of a slice, ascending."""
    start, stop, width, step = piece if len(piece) == 4 else (*piece, 1, 1)
    offsets = torch.arange(stop - start, device="cpu")
    return to_device(offsets[offsets % step < width] + start, torch.device(device))


def are_disjoint(slices: Slices, out_features: int) -> bool:
    """Whether the slices lie within the output, and no two share a column."""
    taken = torch.zeros(out_features, dtype=torch.int64)
    for piece in slices:
        start, stop, width, step = piece if len(piece) == 4 else (*piece, 1, 1)
        if not (0 <= start < stop <= out_features and 0 < width <= step):
            return False
        taken[slice_columns(piece)] += 1
    return bool((taken <= 1).all())


def split_slices(lora_A: Tensor, lora_B: Tensor, slices: Slices) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """For each slice its columns of the output, its A `(r, in)` and its B `(width, r)`, as views."""
    columns = [slice_columns(piece, lora_A.device) for piece in slices]
    return zip(columns, lora_A.split(lora_B.shape[1]), split_rows(lora_B, slices), strict=True)


def split_rows(stacked: Tensor, slices: Slices) -> tuple[Tensor, ...]:
    """The rows of each slice in what is stacked as `lora_B` is."""
    return stacked.split([slice_width(piece) for piece in slices])


def block_diagonal(lora_B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """`(out, n * r)`: the B of each slice in its own rows and columns, zeros elsewhere.

    With it, `block_diagonal(lora_B) @ lora_A` is the product of all slices at once. For the whole output it is
    `lora_B` itself, not a copy.
    """
    if list(slices) == [(0, out_features)]:
        return lora_B
    r = lora_B.shape[1]
    placed = lora_B.new_zeros(out_features, len(slices) * r)
    for index, (piece, b) in enumerate(zip(slices, split_rows(lora_B, slices), strict=True)):
        placed[slice_columns(piece, placed.device), index * r : (index + 1) * r] = b
    return placed


def diagonal_blocks(placed: Tensor, slices: Slices) -> list[Tensor]:
    """The inverse of `block_diagonal`: the B `(width, r)` of each slice; concatenated they are `lora_B`."""
    parts = placed.split(placed.shape[1] // len(slices), dim=1)
    return [part[slice_columns(piece, part.device)] for piece, part in zip(slices, parts, strict=True)]
