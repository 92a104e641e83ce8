"""PiSSA and OLoRA: the start is the papers', the base is never touched, and the file is a plain LoRA on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_hf.adapters.save_load import load_adapter, restore_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.lora.fingerprint import fingerprint
from lora_hf.lora.inject import inject, lora_layers, set_adapter
from lora_hf.lora.variants.decomposed import orthonormal_factors, principal_factors
from tests.support.small_models import small_model, token_ids
from tests.tolerances import FILE_ROUNDTRIP, PARITY_FP32

STARTS = ["pissa", "pissa_niter_8", "olora"]


def trained(start: str, kind: str = "roberta", **lora: object) -> torch.nn.Module:
    model = inject(small_model(kind), LoraConfig(**{"r": 4, "init_lora_weights": start, **lora}))
    torch.manual_seed(5)
    for layer in lora_layers(model).values():
        for parameter in layer.adapters["default"].parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
    return model


def test_the_principal_part_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    values = torch.linalg.svdvals(weight)
    for iterations in (None, 16):
        a, b = principal_factors(weight, 5, 0.5, iterations)
        rest = torch.linalg.svdvals(weight - 0.5 * b @ a)
        assert torch.allclose(rest[:7], values[5:], atol=1e-3)
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), atol=1e-4), "the root of S on either side"


def test_the_orthonormal_part_is_of_the_qr_decomposition() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    a, b = orthonormal_factors(weight, 5)
    assert torch.allclose(b.T @ b, torch.eye(5), atol=1e-6)
    assert torch.allclose((weight - b @ a)[:, :5], torch.zeros(12, 5), atol=1e-5), "R is triangular"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_bit_for_bit(start: str, kind: str, dtype: torch.dtype) -> None:
    plain = small_model(kind).to(dtype)
    before, logits = fingerprint(plain), plain(token_ids()).logits
    model = inject(plain, LoraConfig(r=4, targets=("all",), init_lora_weights=start))
    assert torch.equal(model(token_ids()).logits, logits)
    assert fingerprint(model) == before
    assert all(layer.adapters["default"].lora_B.any() for layer in lora_layers(model).values())


@pytest.mark.parametrize("start", STARTS)
def test_another_adapter_and_none_meet_the_plain_base(start: str) -> None:
    plain = small_model("roberta")(token_ids()).logits
    model = trained(start)
    inject(model, LoraConfig(r=2), name="other")
    assert torch.equal(model(token_ids()).logits, plain)
    assert torch.equal(set_adapter(model, None)(token_ids()).logits, plain)
    assert not torch.allclose(set_adapter(model, "default")(token_ids()).logits, plain, atol=1e-3)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_checkpoint_brings_everything_back_bit_for_bit(
    start: str, kind: str, use_rslora: bool, tmp_path: Path
) -> None:
    model = trained(start, kind, use_rslora=use_rslora)
    save_adapter(model, tmp_path)
    fresh = inject(small_model(kind), LoraConfig(r=4, init_lora_weights=start, use_rslora=use_rslora))
    assert not torch.equal(fresh(token_ids()).logits, model(token_ids()).logits)
    restore_adapter(fresh, tmp_path)
    loaded = load_adapter(small_model(kind), tmp_path)
    for path, layer in lora_layers(model).items():
        expected = layer.adapters["default"].state_dict()
        for other in (fresh, loaded):
            found = lora_layers(other)[path].adapters["default"].state_dict()
            assert list(found) == list(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected), path
    assert torch.equal(fresh(token_ids()).logits, model(token_ids()).logits)
    assert torch.allclose(loaded(token_ids()).logits, model(token_ids()).logits, atol=FILE_ROUNDTRIP, rtol=0)


def test_the_gradients_are_those_of_b_times_a() -> None:
    model = trained("pissa")
    layer = next(iter(lora_layers(model).values()))
    weights, x = layer.adapters["default"], torch.randn(5, 32)
    layer(x).square().sum().backward()
    a, b = (parameter.detach().clone().requires_grad_(True) for parameter in (weights.lora_A, weights.lora_B))
    rest = layer.original_weight() - weights.scaling * weights.start_b @ weights.start_a
    y = x @ (rest + weights.scaling * b @ a).T + layer.bias
    y.square().sum().backward()
    for found, wanted in ((weights.lora_A, a), (weights.lora_B, b)):
        scale = max(1.0, float(wanted.grad.abs().max()))
        assert torch.allclose(found.grad, wanted.grad, atol=PARITY_FP32 * scale, rtol=0)


def test_a_file_of_another_variant_does_not_go_into_an_adapter(tmp_path: Path) -> None:
    save_adapter(trained("pissa"), tmp_path)
    for lora in (LoraConfig(r=8), LoraConfig(r=4, init_lora_weights="olora"), LoraConfig(r=8, use_rslora=True)):
        with pytest.raises(AdapterError, match="holds another variant of LoRA: expected init_lora_weights="):
            restore_adapter(inject(small_model("roberta"), lora), tmp_path)


def test_dora_with_a_start_is_refused_and_the_model_left_alone() -> None:
    model = small_model("roberta")
    with pytest.raises(ConfigError, match=r"lora.use_dora and lora.init_lora_weights=pissa exclude each other"):
        inject(model, LoraConfig(use_dora=True, init_lora_weights="pissa"))
    assert not lora_layers(model)
