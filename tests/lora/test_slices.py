"""Which rows of the stacked A and B belong to which columns of the output."""

from __future__ import annotations

import pytest
import torch

from lora_hf.lora.slices import block_diagonal, diagonal_blocks, split_rows, split_slices

OUT, IN, R = 12, 5, 2


@pytest.mark.parametrize("slices", [[(0, 12)], [(0, 4), (8, 12)], [(3, 4), (4, 9)], [(2, 7)]])
def test_split_and_block_diagonal_describe_one_product(slices: list[tuple[int, int]]) -> None:
    width = sum(stop - start for start, stop in slices)
    a, b = torch.randn(len(slices) * R, IN), torch.randn(width, R)
    placed = block_diagonal(b, slices, OUT)
    assert placed.shape == (OUT, len(slices) * R)
    product = torch.zeros(OUT, IN)
    for columns, slice_a, slice_b in split_slices(a, b, slices):
        assert (slice_a.shape, slice_b.shape) == ((R, IN), (columns.stop - columns.start, R))
        product[columns] = slice_b @ slice_a
    torch.testing.assert_close(placed @ a, product)
    assert placed.count_nonzero() == b.count_nonzero()
    assert torch.equal(torch.cat(diagonal_blocks(placed, slices)), b)
    assert torch.equal(torch.cat(split_rows(b, slices)), b)


def test_rows_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="split"):
        split_rows(torch.zeros(7, R), [(0, 4), (8, 12)])
