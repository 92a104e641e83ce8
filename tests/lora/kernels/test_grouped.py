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
    return Stack(torch.randn(IN, adapters, RANK).to(dtype), torch.randn(adapters, RANK, OUT).to(dtype))


def wanted(y: torch.Tensor, x: torch.Tensor, stack: Stack, order: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    y, x = y.double(), x.double()
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        for place in order[start:end]:
            y[place] += x[place] @ stack.lora_A[:, number].double() @ stack.lora_B[number].double()
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
    stack.lora_A[:, 0] = torch.inf
    with torch.no_grad():
        found = add_grouped(torch.zeros(PLACES, OUT, dtype=dtype), x, stack, None, ENDS)
    assert found[ENDS[0] :].isfinite().all()
    assert not found[: ENDS[0]].isfinite().all()
