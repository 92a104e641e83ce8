from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_hf.lora.active_adapter import AdapterState
from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.variants.dora import DoraWeights
from tests.tolerances import MERGE_FP32, PARITY_FP32

FUSED = [(0, 6), (12, 18)]
BASES = {
    "linear": lambda: nn.Linear(10, 18),
    "conv1d": lambda: Conv1D(18, 10),
    "no bias": lambda: nn.Linear(10, 18, False),
}


def adapted(base: str, slices: list[tuple[int, int]], dropout: float = 0.0) -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(BASES[base]().requires_grad_(False), AdapterState())
    weights = DoraWeights(layer.original_weight(), 10, slices, 3, 5, dropout)
    layer.adapters["default"] = weights
    layer.adapter_state.active_adapter = "default"
    return layer.eval()


def stir(layer: LoraLinear) -> LoraLinear:
    weights = layer.adapters["default"]
    nn.init.normal_(weights.lora_B)
    weights.lora_magnitude_vector.data *= torch.rand(len(weights.lora_magnitude_vector)) + 0.5
    return layer


def by_hand(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """Equation 5, one output column after the other; the norm is a constant."""
    weights, weight = layer.adapters["default"], layer.original_weight()
    rows = list(weight)
    place = 0
    for index, (start, stop) in enumerate(weights.slices):
        a = weights.lora_A[index * weights.r : (index + 1) * weights.r]
        for column in range(start, stop):
            direction = weight[column] + weights.lora_B[place] @ a * (5 / 3)
            rows[column] = weights.lora_magnitude_vector[place] * direction / direction.norm().detach()
            place += 1
    y = x @ torch.stack(rows).T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("slices", [[(0, 18)], FUSED])
def test_output_and_every_gradient_are_equation_5(base: str, slices: list[tuple[int, int]]) -> None:
    layer = stir(adapted(base, slices))
    twin, x = copy.deepcopy(layer), torch.randn(4, 10, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    y, expected = layer(x), by_hand(twin, other)
    assert torch.allclose(y, expected, atol=PARITY_FP32)
    y.square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in zip((x, *layer.adapters.parameters()), (other, *twin.adapters.parameters()), strict=True):
        assert wanted.grad.any()
        assert torch.allclose(found.grad, wanted.grad, atol=PARITY_FP32 * max(1, float(wanted.grad.abs().max())))
    layer.adapters["default"].lora_magnitude_vector.data[2] += 0.01
    assert not torch.allclose(layer(x), expected, atol=PARITY_FP32), "the test could not fail"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_bit_for_bit(base: str, dtype: torch.dtype) -> None:
    layer = adapted(base, FUSED)
    layer.to(dtype)
    layer.adapters["default"] = DoraWeights(layer.original_weight(), 10, FUSED, 3, 5)
    x = torch.randn(4, 10, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.adapters["default"].lora_magnitude_vector.dtype == torch.float32


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("slices", [[(0, 18)], FUSED])
def test_merge_is_exact_and_leaves_other_columns_alone(base: str, slices: list[tuple[int, int]]) -> None:
    layer, x = stir(adapted(base, slices)), torch.randn(4, 10)
    before, y, delta = layer.weight.clone(), layer(x), layer.delta_weight("default")
    layer.merge()
    assert torch.allclose(layer(x), y, atol=MERGE_FP32)
    assert torch.equal(layer.delta_weight("default"), delta), "asked of a merged layer, it is still what was added"
    assert not torch.allclose(layer.weight, before, atol=1e-2)
    if slices == FUSED:
        assert not delta[6:12].any()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    with pytest.raises(TypeError, match="depends on the base weight"):
        layer.adapters["default"].delta_weight(18)


def test_dropout_acts_on_the_input_of_a_alone() -> None:
    layer, x = stir(adapted("linear", [(0, 18)], dropout=0.5)), torch.randn(200, 10)
    plain = layer(x)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert not torch.equal(layer(x), layer(x))
    assert torch.allclose(mean, plain, atol=1.0), "dropout keeps the expectation"
    nn.init.zeros_(layer.adapters["default"].lora_B)
    assert torch.equal(layer(x), layer(x))


def test_a_row_of_zeros_and_a_plain_adapter_beside_it() -> None:
    base = nn.Linear(10, 18)
    base.weight.data[3] = 0
    layer = LoraLinear(base.requires_grad_(False), AdapterState())
    layer.adapters["dora"] = DoraWeights(layer.original_weight(), 10, [(0, 18)], 2, 2)
    layer.adapters["plain"] = LoraWeights(10, [(0, 18)], 2, 2)
    x = torch.randn(4, 10)
    for layer.adapter_state.active_adapter in ("dora", "plain"):
        assert torch.equal(layer(x), base(x))
