"""Bases that transformers loaded with `TorchAoConfig`. Most tests need torchao and are skipped where it is missing."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TorchAoConfig, Trainer, TrainingArguments

from lora_hf.adapters.pretrained import load_adapter
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ModelError
from lora_hf.lora.inject import adapter_heads, eject, inject, lora_layers, merge
from lora_hf.lora.quantization import is_torchao
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import QUANTISED_FP32

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own
NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
WEIGHT_ONLY = {
    "int8": ("Int8WeightOnlyConfig", {}),
    "int4": ("IntxWeightOnlyConfig", {"weight_dtype": getattr(torch, "int4", None)}),
    "float8": ("Float8WeightOnlyConfig", {}),
}


@pytest.fixture(params=["bert", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    small_model(request.param, 3, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def packed(base: Path, config: str, **options: Any) -> PreTrainedModel:
    quantization = importlib.import_module("torchao.quantization")
    scheme = TorchAoConfig(getattr(quantization, config)(**options))
    return AutoModelForSequenceClassification.from_pretrained(
        base, quantization_config=scheme, dtype=torch.float32
    ).eval()


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Linear) and is_torchao(module.weight):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return plain


def outcome(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    y = model(token_ids(), labels=torch.tensor([0, 1, 2]))
    y.loss.backward()
    return y.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_up_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=QUANTISED_FP32 * float(expected.abs().max()), rtol=0)


@NEEDS_TORCHAO
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_an_adapter_runs_and_learns_beside_the_packed_weights(base: Path, scheme: str, tmp_path: Path) -> None:
    config, options = WEIGHT_ONLY[scheme]
    model = inject(packed(base, config, **options), LoraConfig(r=2, targets=("all",)))
    Trainer(model, TrainingArguments(str(tmp_path / "out"), report_to="none"))  # refuses what it takes for a plain base
    layers = lora_layers(model).values()
    assert layers
    assert all(is_torchao(layer.base_layer.weight) and not layer.base_layer.weight.requires_grad for layer in layers)
    randomize_lora_b(model)
    (logits, gradients), (expected, exact) = outcome(model), outcome(dequantized(model))
    assert_equal_up_to_rounding(logits, expected)
    assert gradients.keys() == exact.keys()
    assert all("lora_" in name or ".modules_to_save." in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert_equal_up_to_rounding(gradient, exact[name])


@NEEDS_TORCHAO
def test_the_file_holds_the_adapter_alone_and_loads_on_the_same_base(base: Path, tmp_path: Path) -> None:
    model = inject(packed(base, "Int8WeightOnlyConfig"), LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    save_adapter(model, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        heads = tuple(f"base_model.model.{path}." for path in adapter_heads(model))
        assert all(".lora_" in key or key.startswith(heads) for key in file.keys())  # noqa: SIM118
    loaded = load_adapter(packed(base, "Int8WeightOnlyConfig"), tmp_path / "adapter")
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    other = small_model(model.config.model_type, 3, seed=1, hidden_size=64, intermediate_size=128)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(packed(tmp_path / "other", "Int8WeightOnlyConfig"), tmp_path / "adapter")


@NEEDS_TORCHAO
def test_what_needs_the_numbers_of_a_packed_weight_is_refused_by_name(base: Path) -> None:
    model = packed(base, "Int8WeightOnlyConfig")
    before = model(token_ids()).logits
    for variant in (LoraConfig(r=2, targets=("q",), use_dora=True), LoraConfig(r=2, init_lora_weights="pissa")):
        with pytest.raises(AdapterError, match=r"Linear: its weight is packed \(Int8Tensor\)"):
            inject(model, variant)
        eject(model)
    inject(model, LoraConfig(r=2, targets=("q",)))
    with pytest.raises(AdapterError, match=r"Linear: its weight is packed \(Int8Tensor\)"):
        merge(model)
    assert_equal_up_to_rounding(eject(model)(token_ids()).logits, before)  # a packed head stays unpacked


@NEEDS_TORCHAO
@pytest.mark.parametrize("config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_kinds_that_give_their_input_no_gradient_are_refused_unchanged(base: Path, config: str) -> None:
    model = packed(base, config)
    modules = dict(model.named_modules())
    with pytest.raises(ModelError, match=r"for inference only: its input gets no gradient\. Load .* weight-only"):
        inject(model, LoraConfig(r=2))
    assert dict(model.named_modules()) == modules


class WithoutGradient(torch.Tensor):
    """As torchao's weights that quantize the input as well; `loses` is how the product loses the gradient."""

    __module__ = "torchao.quantization"
    loses: Callable[[torch.Tensor], torch.Tensor]

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return [], {}

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *_ = inputs
            return cls.loses(x @ weight.as_subclass(torch.Tensor).T)
        return super().__torch_function__(function, types, inputs, named)


def fail(y: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("derivative for aten::_weight_int4pack_mm is not implemented")


@pytest.mark.parametrize(
    ("loses", "reason"), [(torch.Tensor.detach, "its input gets no gradient"), (fail, "derivative for aten")]
)
def test_the_refusal_names_the_weight_and_what_to_do_instead(
    loses: Callable[[torch.Tensor], torch.Tensor], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torchao is missing: a tensor subclass takes the place of its own."""
    monkeypatch.setattr(WithoutGradient, "loses", staticmethod(loses), raising=False)
    adapter = save_adapter(inject(small_model("llama"), LoraConfig(r=2, targets=("q",))), tmp_path / "adapter")
    model = small_model("llama")
    path, layer = next((path, each) for path, each in model.named_modules() if isinstance(each, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(WithoutGradient), requires_grad=False)
    for change in (lambda: inject(model, LoraConfig(r=2)), lambda: load_adapter(model, adapter)):
        with pytest.raises(ModelError) as error:
            change()
        for word in (path, "torchao", "WithoutGradient", reason, "lora_hf.quantise", "BitsAndBytesConfig"):
            assert word in str(error.value)
    assert not lora_layers(model)
