"""The fused projection equals its definition: output and every gradient, in every layout and precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from lora_hf.lora.kernels.dropout import STEPS, dropout_mask
from lora_hf.lora.kernels.fused import Projection, can_fuse, lora_linear, lora_linears
from lora_hf.lora.kernels.reference import add_lora
from tests.tolerances import FUSED_RTOL, GRADCHECK

SLICES = {"whole": [(0, 7)], "two": [(0, 3), (4, 7)], "all three": [(0, 2), (2, 5), (5, 7)]}
SHAPES = [(1,), (3,), (2, 3), (0, 3)]
SCALING = 1.7
CPU = torch.device("cpu")


def draw(*shape: int, dtype: torch.dtype = torch.float64, frozen: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(not frozen)


def parameters(slices: list[tuple[int, int]], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    width = sum(stop - start for start, stop in slices)
    master = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return draw(2 * len(slices), 5, dtype=master), draw(width, 2, dtype=master)


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", ["(out, in)", "(in, out)"])
def test_gradcheck(slices: list[tuple[int, int]], shape: tuple[int, ...], stored: str) -> None:
    torch.manual_seed(0)
    weight = draw(7, 5, frozen=True) if stored == "(out, in)" else draw(5, 7, frozen=True).T
    bias = draw(7, frozen=True)
    inputs = (draw(*shape, 5), *parameters(slices, torch.float64))
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, weight, bias, a, b, SCALING, slices), inputs, **GRADCHECK
    )


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_without_gradients_it_computes_the_same(
    slices: list[tuple[int, int]], shape: tuple[int, ...], packed: bool
) -> None:
    torch.manual_seed(0)
    weight, bias, x = draw(7, 5, frozen=True), draw(7, frozen=True), draw(*shape, 5, frozen=True)
    a, b = parameters(slices, torch.float64)
    expected = add_lora(linear(x, weight, bias), x, a, b, SCALING, slices)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = lora_linear(x, weight.to if packed else weight, bias, a, b, SCALING, slices)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected)


def results(how: str, dtype: torch.dtype, slices: list[tuple[int, int]], dropout: float = 0.0) -> list[torch.Tensor]:
    """Output and gradients of x, A and B, from the fused function, the definition, or a wrong implementation."""
    torch.manual_seed(0)
    weight, bias = draw(7, 5, dtype=dtype, frozen=True), draw(7, dtype=dtype, frozen=True)
    x, upstream = draw(4, 9, 5, dtype=dtype), torch.randn(4, 9, 7).to(dtype)
    a, b = parameters(slices, dtype)
    torch.manual_seed(1)
    if how == "fused":
        y = lora_linear(x, weight, bias, a, b, SCALING, slices, dropout)
    else:
        dropout = round(dropout * STEPS) / STEPS
        keep = dropout_mask(x.shape, dropout, x.device).double() / (1 - dropout) if dropout else 1.0
        scaling = 1.0 if how == "no scaling" else SCALING
        seen = x if how == "no dropout" else (x * keep).to(dtype)
        if how == "wrong slice":
            slices = [(start + 1, stop) for start, stop in slices][:1] + slices[1:]
            b = b[1:]
        y = add_lora(linear(x, weight, bias), seen, a, b, scaling, slices)
    y.backward(upstream)
    return [y.detach(), *(tensor.grad for tensor in (x, a) if tensor.grad is not None)]


def apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    return max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("dtype", FUSED_RTOL, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_is_the_reference_and_nothing_near_it(slices: list, dtype: torch.dtype, dropout: float) -> None:
    wanted = results("reference", dtype, slices, dropout)
    assert apart(results("fused", dtype, slices, dropout), wanted) < FUSED_RTOL[dtype]
    for wrong in ("no scaling", "wrong slice", *(["no dropout"] if dropout else [])):
        assert apart(results(wrong, dtype, slices, dropout), wanted) > FUSED_RTOL[dtype], f"{wrong} would pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_come_in_the_masters_precision_and_only_where_asked(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = draw(7, 5, dtype=dtype, frozen=True)
    a, b = parameters(SLICES["two"], dtype)
    x = draw(3, 5, dtype=dtype, frozen=True)
    lora_linear(x, weight, None, a, b, SCALING, SLICES["two"]).sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert a.grad is not None
    assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 5)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_model_may_change_the_output_in_place(shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    x, bias = draw(*shape, dtype=torch.float32), draw(7, dtype=torch.float32, frozen=True) if has_bias else None
    weight, (a, b) = draw(7, 5, dtype=torch.float32, frozen=True), parameters(SLICES["whole"], torch.float32)
    lora_linear(x, weight, bias, a, b, SCALING, SLICES["whole"]).mul_(2).sum().backward()
    halved = torch.autograd.grad(lora_linear(x, weight, bias, a, b, SCALING, SLICES["whole"]).sum(), (x, a, b))
    assert all(torch.equal(each.grad, 2 * half) for each, half in zip((x, a, b), halved, strict=True))


def test_one_input_is_saved_once_for_three_projections() -> None:
    torch.manual_seed(0)
    x = draw(64, 5, dtype=torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for _ in range(3):
            a, b = parameters(SLICES["whole"], torch.bfloat16)
            lora_linear(x, draw(7, 5, dtype=torch.bfloat16, frozen=True), None, a, b, SCALING, SLICES["whole"])
    wide = {tensor.data_ptr() for tensor in saved if tensor.shape == x.shape}
    assert wide == {x.data_ptr()}


def test_it_stands_in_only_where_it_is_the_same() -> None:
    x, weight = draw(3, 5, dtype=torch.float32), draw(7, 5, dtype=torch.float32, frozen=True)
    assert can_fuse(x, weight, None)
    assert not can_fuse(x, weight.clone().requires_grad_(), None), "a trained projection"
    assert not can_fuse(x, weight, torch.zeros(7, requires_grad=True)), "a trained bias"
    assert not can_fuse(x, weight.bfloat16(), None), "another precision"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_fuse(x, weight, None), "autocast decides the precision"


def several(dtype: torch.dtype, scalings: tuple[float, ...] = (SCALING, 0.4, 2.0)) -> list[Projection]:
    """Projections of one input: of several widths, ranks, slices and scalings, with a bias, and packed."""
    torch.manual_seed(0)
    wide, narrow = parameters(SLICES["two"], dtype), parameters([(0, 4)], dtype)
    higher = draw(3, 5, dtype=wide[0].dtype), draw(7, 3, dtype=wide[0].dtype)
    return [
        Projection(
            draw(7, 5, dtype=dtype, frozen=True), draw(7, dtype=dtype, frozen=True), *wide, scalings[0], SLICES["two"]
        ),
        Projection(draw(4, 5, dtype=dtype, frozen=True).to, None, *narrow, scalings[1], [(0, 4)]),
        Projection(draw(5, 7, dtype=dtype, frozen=True).T, None, *higher, scalings[2], [(0, 7)]),
    ]


def outputs_and_gradients(projections: list[Projection], together: bool, used: tuple[int, ...] = (0, 1, 2)) -> list:
    torch.manual_seed(1)
    dtype = projections[2].weight.dtype  # type: ignore[union-attr]
    x = draw(4, 9, 5, dtype=dtype)
    ys = lora_linears(x, projections) if together else [lora_linear(x, *each) for each in projections]
    factors = [factor for each in projections for factor in (each.lora_A, each.lora_B) if factor.requires_grad]
    upstream = [torch.randn(*y.shape).to(dtype) for y in ys]
    loss = sum((ys[index] * upstream[index]).sum() for index in used)
    gradients = torch.autograd.grad(loss, [x, *factors], allow_unused=True)  # type: ignore[arg-type]
    return [*(y.detach() for y in ys), *(x.new_zeros(1) if each is None else each for each in gradients)]


@pytest.mark.parametrize("dtype", FUSED_RTOL, ids=str)
def test_projections_of_one_input_are_each_of_them_alone(dtype: torch.dtype) -> None:
    wanted = outputs_and_gradients(several(dtype), together=False)
    found = outputs_and_gradients(several(dtype), together=True)
    assert [each.shape for each in found] == [each.shape for each in wanted]
    for number, (ours, alone) in enumerate(zip(found, wanted, strict=True)):
        assert apart([ours], [alone]) < FUSED_RTOL[dtype], number
    other = outputs_and_gradients(several(dtype, (0.4, SCALING, 2.0)), together=True)
    assert apart(other, wanted) > FUSED_RTOL[dtype], "scalings in another order would pass"


def test_equal_scalings_of_one_input_are_those_of_each_alone() -> None:
    scalings = (SCALING,) * 3
    wanted = outputs_and_gradients(several(torch.float64, scalings), together=False)
    assert (
        apart(outputs_and_gradients(several(torch.float64, scalings), together=True), wanted)
        < FUSED_RTOL[torch.float64]
    )


def test_an_output_that_nothing_uses_and_frozen_factors_change_no_gradient() -> None:
    frozen = several(torch.float64)
    frozen[0].lora_A.requires_grad_(False)
    frozen[2].lora_B.requires_grad_(False)
    found = outputs_and_gradients(frozen, together=True, used=(0, 2))
    wanted = outputs_and_gradients(frozen, together=False, used=(0, 2))
    assert all(not each.any() for each in found[5:7]), "those of the one in the middle"
    for ours, alone in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, alone.expand_as(ours))
