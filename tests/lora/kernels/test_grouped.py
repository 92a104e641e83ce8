"""The product of several adapters on one batch against the same product place by place."""

from __future__ import annotations

import pytest
import torch

from lora_hf.lora.kernels.grouped import WIDE, Stack, add_grouped
from tests import tolerances

IN, OUT, RANK = 24, 40, 8
ENDS = (3, 3, 7, 12)  # the second adapter has no place; two of the fourteen places are the base's
PLACES = 14


def stack_of(adapters: int, dtype: torch.dtype) -> Stack:
    pairs = [(torch.randn(IN, RANK).to(dtype), torch.randn(RANK, OUT).to(dtype)) for _ in range(adapters)]
    return Stack(tuple(pairs))


def wanted(y: torch.Tensor, x: torch.Tensor, stack: Stack, order: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    y, x = y.double(), x.double()
    for pair, start, end in zip(stack.pairs, (0, *ends), ends, strict=False):
        assert pair
        for place in order[start:end]:
            lora_a, lora_b = pair
            y[place] += x[place] @ lora_a.double() @ lora_b.double()
    return y


@pytest.mark.parametrize("shape", [(PLACES,), (PLACES, 3)], ids=["tokens", "rows"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("adapters", [4, WIDE // RANK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_place_has_its_own_adapters_product(
    dtype: torch.dtype, adapters: int, ordered: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    ends = ENDS + (ENDS[-1],) * (adapters - len(ENDS))
    x, y = torch.randn(*shape, IN).to(dtype), torch.randn(*shape, OUT).to(dtype)
    stack, order = stack_of(adapters, dtype), torch.arange(PLACES) if ordered else torch.randperm(PLACES)
    expected = wanted(y, x, stack, order, ends)
    with torch.no_grad():
        found = add_grouped(y.clone(), x, stack, None if ordered else order, ends)
    assert (found.double() - expected).abs().max() < tolerances.FUSED_RTOL[dtype] * expected.abs().max()
    assert torch.equal(found[order[ENDS[-1] :]], y[order[ENDS[-1] :]])


def test_the_sum_is_written_over_the_bases_output() -> None:
    x, y, stack = torch.randn(PLACES, IN), torch.randn(PLACES, OUT), stack_of(4, torch.float32)
    with torch.no_grad():
        assert add_grouped(y, x, stack, None, ENDS) is y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_number_in_one_adapter_stays_there(dtype: torch.dtype) -> None:
    x, stack = torch.randn(PLACES, IN).to(dtype), stack_of(4, dtype)
    assert stack.pairs[0]
    stack.pairs[0][0].fill_(torch.inf)
    with torch.no_grad():
        found = add_grouped(torch.zeros(PLACES, OUT, dtype=dtype), x, stack, None, ENDS)
    assert found[ENDS[0] :].isfinite().all()
    assert not found[: ENDS[0]].isfinite().all()
