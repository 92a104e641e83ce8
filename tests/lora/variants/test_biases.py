from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_hf.adapters.format import CONFIG_FILE
from lora_hf.adapters.save_load import load_adapter, restore_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ModelError
from lora_hf.lora.fingerprint import fingerprint
from lora_hf.lora.inject import count_parameters, eject, inject, lora_layers, merge, set_adapter, unmerge
from lora_hf.lora.variants.biases import biased_modules
from lora_hf.models.load import dequantise, quantise
from tests.support.small_models import small_model, token_ids
from tests.tolerances import FILE_ROUNDTRIP, MERGE_FP32, QUANTISED_FP32

BIASES = ["lora_only", "all"]

QV = ("q", "v")


def trained(bias: str, kind: str = "roberta", num_labels: int | None = 3, **lora: object) -> nn.Module:
    model = inject(small_model(kind, num_labels), LoraConfig(**{"r": 2, "targets": QV, "bias": bias, **lora}))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    return model


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_and_trains_fp32_masters(bias: str, dtype: torch.dtype) -> None:
    plain = small_model("roberta").to(dtype) if bias == "lora_only" else small_model("roberta", 3).to(dtype)
    logits, before = plain(token_ids()).logits, fingerprint(plain)
    model = inject(plain, LoraConfig(targets=QV, bias=bias))
    assert torch.allclose(model(token_ids()).logits.float(), logits.float(), atol=0 if dtype == torch.float32 else 1e-2)
    assert fingerprint(model) == before
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "adapters" in name}
    assert all(model.get_parameter(name).dtype == torch.float32 for name in names)
    biases = {name for name in names if name.endswith(".bias")}
    assert len(biases) == (4 if bias == "lora_only" else 2 * 8 + 1), "of q and v; of every projection and norm"
    counts = count_parameters(model)
    assert counts.trainable == counts.lora + counts.head


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ["roberta", "gpt2", "deberta-v2", "llama"])
def test_switching_merging_and_ejecting_give_the_base_back_bit_for_bit(bias: str, kind: str) -> None:
    plain = small_model(kind, 3)
    before, logits = {key: value.clone() for key, value in plain.state_dict().items()}, plain(token_ids()).logits
    mark, model = fingerprint(plain), trained(bias, kind)
    adapted = model(token_ids()).logits
    assert not torch.allclose(adapted, logits, atol=1e-3)
    assert torch.equal(set_adapter(model, None)(token_ids()).logits, logits)
    inject(model, LoraConfig(r=2, targets=QV), name="other")
    assert torch.equal(set_adapter(model, "default")(token_ids()).logits, adapted)
    assert torch.allclose(merge(model)(token_ids()).logits, adapted, atol=MERGE_FP32)
    assert fingerprint(model) == mark, "merged, the base is still known"
    assert torch.equal(unmerge(model)(token_ids()).logits, adapted)
    after = eject(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_ejected_after_a_merge_the_plain_model_has_the_trained_biases() -> None:
    for bias in BIASES:
        model = trained(bias)
        adapted = model(token_ids()).logits
        assert not biased_modules(eject(merge(model)))
        assert not lora_layers(model)
        assert torch.allclose(model(token_ids()).logits, adapted, atol=MERGE_FP32)


@pytest.mark.parametrize("bias", BIASES)
def test_a_file_brings_them_back_and_a_missing_one_is_an_error(bias: str, tmp_path: Path) -> None:
    model = trained(bias)
    logits = model(token_ids()).logits
    save_adapter(model, tmp_path)
    loaded = load_adapter(small_model("roberta", 3), tmp_path)
    fresh = inject(small_model("roberta", 3), LoraConfig(r=2, targets=QV, bias=bias))
    restore_adapter(fresh, tmp_path)
    for other in (loaded, fresh):
        assert torch.allclose(other(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    with pytest.raises(AdapterError, match=r"extra: .*query.base_layer.bias"):
        restore_adapter(inject(small_model("roberta", 3), LoraConfig(r=2, targets=QV)), tmp_path)
    config = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_text(config.replace(f'"bias": "{bias}"', '"bias": "none"'))
    with pytest.raises(AdapterError, match=r"extra: .*bias"):
        load_adapter(small_model("roberta", 3), tmp_path)
    (tmp_path / CONFIG_FILE).write_text(config.replace(f'"bias": "{bias}"', '"bias": "some"'))
    with pytest.raises(AdapterError, match="bias: expected one of none, all, lora_only, found 'some'"):
        load_adapter(small_model("roberta", 3), tmp_path)


def test_two_adapters_of_all_biases_answer_each_for_itself() -> None:
    model = trained("all")
    first = model(token_ids()).logits
    inject(model, LoraConfig(r=2, targets=QV, bias="all"), name="other")
    second = model(token_ids()).logits
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(set_adapter(model, "default")(token_ids()).logits, first)


def test_an_adapter_of_all_biases_loads_beside_packed_weights(tmp_path: Path) -> None:
    save_adapter(trained("all"), tmp_path)
    packed = load_adapter(quantise(small_model("roberta", 3), "int8"), tmp_path)
    expected = dequantise(copy.deepcopy(packed))(token_ids()).logits
    assert torch.allclose(packed(token_ids()).logits, expected, atol=QUANTISED_FP32)
    assert not torch.allclose(set_adapter(packed, None)(token_ids()).logits, expected, atol=1e-2)


def test_places_that_cannot_be_shared_and_biases_of_another_kind_are_refused() -> None:
    model = trained("all")
    with pytest.raises(AdapterError, match=r"key: adapter 'default' .*bias alone"):
        inject(model, LoraConfig(targets=("k",)), name="other")
    model = inject(small_model("roberta", 3), LoraConfig(targets=("k",)))
    with pytest.raises(AdapterError, match=r"key has A and B of another adapter"):
        inject(model, LoraConfig(targets=("q",), bias="all"), name="other")
    with pytest.raises(ModelError, match=r"lm_head is a RobertaLMHead.*lora.bias=lora_only"):
        inject(small_model("roberta"), LoraConfig(targets=QV, bias="all"))
