from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.active_adapter import AdapterState
from lora_hf.lora.inject import inject, merge
from lora_hf.lora.kernels.reference import add_lora
from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.modules_to_save import ModulesToSaveWrapper
from lora_hf.lora.multi_adapter import use_adapter
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import GRADCHECK, MERGE_BF16, MERGE_FP32, PARITY_FP32

FUSED = [(0, 6), (12, 18)]  # q and v of a projection to 18 columns
LAYOUTS = {
    "linear": (lambda: nn.Linear(10, 18), [(0, 18)]),
    "conv1d": (lambda: Conv1D(18, 10), [(0, 18)]),
    "fused linear": (lambda: nn.Linear(10, 18), FUSED),
    "fused conv1d": (lambda: Conv1D(18, 10), FUSED),
}


def adapted(layout: str, r: int = 3, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LoraLinear:
    torch.manual_seed(0)
    make, slices = LAYOUTS[layout]
    layer = LoraLinear(make().to(dtype).requires_grad_(False), AdapterState())
    layer.adapters["default"] = LoraWeights(10, slices, r, lora_alpha=5, lora_dropout=dropout)
    nn.init.normal_(layer.adapters["default"].lora_B)
    layer.adapter_state.active_adapter = "default"
    return layer.eval()


def by_hand(layer: LoraLinear, x: torch.Tensor, scaling: float = 5 / 3, slices: list | None = None) -> torch.Tensor:
    """The definition, written the long way: one column block after the other, no shared code."""
    weights = layer.adapters["default"]
    y = layer.base_layer(x).clone()
    row = 0
    for index, (start, stop) in enumerate(slices or weights.slices):
        a = weights.lora_A[index * weights.r : (index + 1) * weights.r]
        b = weights.lora_B[row : row + stop - start]
        y[..., start:stop] += scaling * (x @ a.T) @ b.T
        row += stop - start
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layer_is_its_definition_and_nothing_near_it(layout: str) -> None:
    layer, x = adapted(layout), torch.randn(2, 5, 10)
    assert torch.allclose(layer(x), by_hand(layer, x), atol=PARITY_FP32)
    wrong = [layer.base_layer(x), by_hand(layer, x, scaling=1.0), by_hand(layer, x, scaling=5.0)]
    if layer.adapters["default"].slices == FUSED:
        wrong.append(by_hand(layer, x, slices=[(6, 12), (12, 18)]))
    for other in wrong:
        assert not torch.allclose(layer(x), other, atol=PARITY_FP32), "the test could not fail"


@pytest.mark.parametrize("slices", [[(0, 7)], [(0, 3), (4, 7)]])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3), (0, 3)])
def test_every_gradient_of_the_reference(slices: list[tuple[int, int]], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    width = sum(stop - start for start, stop in slices)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    inputs = (draw(*shape, 7), draw(*shape, 5), draw(2 * len(slices), 5), draw(width, 2))
    assert torch.autograd.gradcheck(lambda y, x, a, b: add_lora(y, x, a, b, 1.7, slices), inputs, **GRADCHECK)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, MERGE_FP32), (torch.bfloat16, MERGE_BF16)])
def test_merge_rounds_once_is_idempotent_and_unmerge_restores_bit_for_bit(
    layout: str, dtype: torch.dtype, tolerance: float
) -> None:
    layer, x = adapted(layout, dtype=dtype), torch.randn(4, 10, dtype=dtype)
    before, unmerged = layer.weight.clone(), layer(x)
    delta = layer.adapters["default"].delta_weight(18)
    rounded_once = (before.float() + (delta.T if "conv1d" in layout else delta)).to(dtype)
    for _ in range(50):
        layer.merge()
        layer.merge()
        assert torch.equal(layer.weight, rounded_once)
        assert layer.weight.dtype == dtype
        scale = max(1.0, float(unmerged.detach().float().abs().max()))
        assert float((layer(x) - unmerged).detach().float().abs().max()) <= tolerance * scale
        layer.unmerge()
        assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), unmerged)


def test_merging_another_adapter_takes_the_first_one_out() -> None:
    layer = adapted("linear")
    layer.adapters["other"] = LoraWeights(10, [(0, 18)], 2, lora_alpha=2)
    nn.init.normal_(layer.adapters["other"].lora_B)
    before = layer.weight.clone()
    layer.merge()
    layer.adapter_state.active_adapter = "other"
    layer.merge()
    assert torch.allclose(layer.weight, before + layer.adapters["other"].delta_weight(18), atol=MERGE_FP32)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_train_and_eval_never_change_a_weight() -> None:
    layer = adapted("linear")
    for merged in (False, True):
        if merged:
            layer.merge()
        before = layer.weight.clone()
        layer.train().eval().train()
        assert torch.equal(layer.weight, before)


def test_a_starts_kaiming_uniform_and_b_zero() -> None:
    torch.manual_seed(3)
    weights = LoraWeights(50, FUSED, r=4, lora_alpha=8)
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(8, 50), a=5**0.5)
    assert torch.equal(weights.lora_A.data, expected)
    assert not weights.lora_B.any()
    assert (weights.lora_A.shape, weights.lora_B.shape) == ((8, 50), (12, 4))


def test_dropout_acts_on_the_input_of_lora_in_training_only() -> None:
    layer, x = adapted("linear", dropout=0.5), torch.randn(2000, 10)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    mean = (first - layer.base_layer(x)).mean(0)
    layer.eval()
    assert torch.allclose(mean, (layer(x) - layer.base_layer(x)).mean(0), atol=0.3), "dropout keeps the expectation"
    zeroed = (first - layer.base_layer(x)).abs().amax(1) == 0
    assert 0 < int(zeroed.sum()) < 2000 * 0.01, "each feature of x is dropped by itself: all ten rarely are"


@pytest.mark.parametrize("cast", [lambda module: module.half(), lambda module: module.to(torch.bfloat16)])
def test_lora_and_head_stay_fp32_and_exact_whatever_the_base_is_cast_to(cast) -> None:
    layer = adapted("linear")
    head = ModulesToSaveWrapper(nn.Linear(10, 2), AdapterState())
    head.add("default")
    model = nn.ModuleDict({"layer": layer, "head": head})
    before = [parameter.clone() for parameter in (*layer.adapters.parameters(), *head.modules_to_save.parameters())]
    cast(model)
    assert layer.weight.dtype in (torch.float16, torch.bfloat16)
    after = [*layer.adapters.parameters(), *head.modules_to_save.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    x = torch.randn(3, 10).to(layer.weight.dtype)
    assert layer(x).dtype == layer.weight.dtype
    head.adapter_state.active_adapter = "default"
    assert head(x).dtype == torch.float32
    layer(x).float().sum().backward()
    assert layer.adapters["default"].lora_A.grad.dtype == torch.float32


def test_the_bases_own_head_is_frozen_and_runs_without_an_adapter() -> None:
    head = ModulesToSaveWrapper(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)), AdapterState())
    head.add("default")
    assert {name for name, parameter in head.named_parameters() if parameter.requires_grad} == {
        "modules_to_save.default.0.weight",
        "modules_to_save.default.0.bias",
    }
    assert set(head.state_dict()) == {
        f"{part}.0.{name}" for part in ("original_module", "modules_to_save.default") for name in ("weight", "bias")
    }
    head.eval()
    x = torch.randn(3, 4)
    assert torch.equal(head(x), head.original_module(x)), "no adapter active: the base's own, in eval mode"
    head.adapter_state.active_adapter = "default"
    nn.init.zeros_(head.modules_to_save["default"][0].weight)
    assert not torch.equal(head(x), head.original_module(x))
    assert torch.equal(copy.deepcopy(head)(x), head(x))
    head.to(torch.float64)
    assert head.original_module[0].weight.dtype == torch.float64
    assert head.modules_to_save["default"][0].weight.dtype == torch.float32


def test_hooks_of_the_base_layer_run_with_an_adapter_merged_or_not() -> None:
    model, ids = small_model("llama"), token_ids()
    projection = model.get_submodule("model.layers.0.self_attn.v_proj")
    model(input_ids=ids)
    projection.register_forward_hook(lambda module, inputs, output: output * 2)
    inject(model.eval(), LoraConfig(r=2, targets=("v",)))
    adapted = model(input_ids=ids).logits
    with use_adapter(model, None):
        torch.testing.assert_close(adapted, model(input_ids=ids).logits)
    torch.testing.assert_close(adapted, merge(model)(input_ids=ids).logits)


def test_a_merge_counts_where_accelerate_has_replaced_the_forward_of_the_layers() -> None:
    model, ids = small_model("llama"), token_ids()
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))  # as device_map does on several GPUs
    inject(model.eval(), LoraConfig(r=2, targets=("v",)))
    base = model(input_ids=ids).logits
    randomize_lora_b(model)
    adapted = model(input_ids=ids).logits
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(merge(model)(input_ids=ids).logits, adapted)
