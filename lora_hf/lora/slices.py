"""The slices of a projection: which rows of the stacked A and B belong to which columns of the output.

An adapter of a fused projection (GPT-2's q, k and v) has its own A and B for each slice `(start, stop)` of the output.
`lora_A` is `(n * r, in)` and `lora_B` `(sum of slice widths, r)`: those of the n slices stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

Slices = Sequence[tuple[int, int]]


def split_slices(lora_A: Tensor, lora_B: Tensor, slices: Slices) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each slice its columns of the output, its A `(r, in)` and its B `(width, r)`, as views."""
    columns = [slice(start, stop) for start, stop in slices]
    return zip(columns, lora_A.split(lora_B.shape[1]), split_rows(lora_B, slices), strict=True)


def split_rows(stacked: Tensor, slices: Slices) -> tuple[Tensor, ...]:
    """The rows of each slice in what is stacked as `lora_B` is."""
    return stacked.split([stop - start for start, stop in slices])


def block_diagonal(lora_B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """`(out, n * r)`: the B of each slice in its own rows and columns, zeros elsewhere.

    With it, `block_diagonal(lora_B) @ lora_A` is the product of all slices at once. For the whole output it is
    `lora_B` itself, not a copy.
    """
    if list(slices) == [(0, out_features)]:
        return lora_B
    r = lora_B.shape[1]
    placed = lora_B.new_zeros(out_features, len(slices) * r)
    for index, ((start, stop), b) in enumerate(zip(slices, split_rows(lora_B, slices), strict=True)):
        placed[start:stop, index * r : (index + 1) * r] = b
    return placed


def diagonal_blocks(placed: Tensor, slices: Slices) -> list[Tensor]:
    """The inverse of `block_diagonal`: the B `(width, r)` of each slice, as views; concatenated they are `lora_B`."""
    parts = placed.split(placed.shape[1] // len(slices), dim=1)
    return [part[start:stop] for (start, stop), part in zip(slices, parts, strict=True)]
