"""Sums of factors, their singular values, TIES and DARE against values worked out by hand and dense definitions."""

from __future__ import annotations

import pytest
import torch

from lora_hf.lora.kernels.combination import drop, elect, shorten, sum_of_factors, svd_of_factors, trim
from tests.tolerances import COMBINE_RTOL, COMBINE_SVD_RTOL, DROPPED_MEAN_RTOL, LEFT_OUT_RTOL


def factors(rank: int, rows: int = 9, columns: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def test_the_factors_of_a_sum_are_the_sum() -> None:
    (a, b), (c, d) = factors(2), factors(3, seed=1)
    rows, columns = sum_of_factors([(a, b), (c, d)])
    assert (rows.shape, columns.shape) == ((5, 7), (9, 5))
    scale = float((b @ a + d @ c).abs().max())
    assert torch.allclose(columns @ rows, b @ a + d @ c, atol=COMBINE_RTOL * scale)
    assert not torch.allclose(columns @ rows, b @ a - d @ c, atol=COMBINE_RTOL * scale)


@pytest.mark.parametrize("rank", [1, 3, 7, 20])
def test_the_decomposition_of_factors_is_that_of_their_product(rank: int) -> None:
    a, b = factors(rank)
    u, s, v = svd_of_factors(a, b)
    dense = torch.linalg.svdvals((b @ a).double())[: len(s)]
    assert len(s) == min(rank, 7)
    assert torch.allclose(s, dense, rtol=COMBINE_SVD_RTOL, atol=COMBINE_SVD_RTOL)
    assert torch.allclose((u * s @ v).float(), b @ a, atol=COMBINE_SVD_RTOL)


def test_shortened_factors_are_the_nearest_and_tell_what_they_leave_out() -> None:
    a, b = factors(5)
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    nearest = (u[:, :2] * s[:2]) @ v[:2]
    (short_a, short_b), lost, total = shorten(svd_of_factors(a, b), 2)
    assert (short_a.shape, short_b.shape, short_a.dtype) == ((2, 7), (9, 2), torch.float32)
    scale = float((b @ a).abs().max())
    assert torch.allclose(short_b @ short_a, nearest, atol=COMBINE_SVD_RTOL * scale)
    assert lost == pytest.approx(float((b @ a - nearest).square().sum()), rel=LEFT_OUT_RTOL)
    assert total == pytest.approx(float((b @ a).square().sum()), rel=LEFT_OUT_RTOL)
    assert shorten(svd_of_factors(a, b), 5)[1] == 0


def test_ties_by_hand() -> None:
    one, two, three = torch.tensor([4.0, -1.0, 3.0, 0.5]), torch.tensor([2.0, -3.0, -5.0, 0.1]), torch.zeros(4)
    assert trim(one, torch.tensor(1.0)).tolist() == [4, -1, 3, 0]
    # sums 6, -4, -2, 0.6: the zeros of the third never agree, and at the third entry -5 wins over 3
    merged = elect([one, two, three])
    assert merged.tolist() == pytest.approx([3, -2, -5, 0.3])
    assert elect([one, -one]).tolist() == [0, 0, 0, 0]


def test_dare_keeps_the_share_the_mean_and_its_seed() -> None:
    delta = torch.randn(10, 10, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([drop(delta, 0.5, generator) for _ in range(4000)])
    assert float(((draws.mean(0) - delta) / delta).mean().abs()) < DROPPED_MEAN_RTOL
    assert bool(((draws == 0) | (draws == delta / 0.5)).all())
    assert float((draws == 0).float().mean()) == pytest.approx(0.5, abs=DROPPED_MEAN_RTOL)
    again = drop(delta, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0])
    assert not torch.equal(again, draws[1])
    assert torch.equal(drop(delta, 1.0, generator), delta)
