"""`mark_only_lora_as_trainable` and `lora_state_dict` do the same as those of loralib, on equal models."""

from __future__ import annotations

from pathlib import Path

import loralib
import pytest
import torch
from torch import nn

import lora_hf
from lora_hf.adapters.convert.loralib import load_loralib
from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.inject import Bias, inject, lora_layers
from tests.support.small_models import randomize_lora_b, small_model
from tools.benchmark.peers import with_loralib

MODELS = {
    "roberta": ("roberta", 3, ("q", "v"), None),
    "gpt2": ("gpt2", None, ("q", "v", "ffn"), (True, False, True)),
    "llama": ("llama", None, ("all",), None),  # no projection has a bias
}
BIASES: list[Bias] = ["none", "all", "lora_only"]


def their_name(name: str) -> str:
    """The name of the parameter in loralib, which has no base layers, adapter names and copies of heads."""
    return name.replace(".base_layer", "").replace(".adapters.default", "").replace(".modules_to_save.default", "")


def both(case: str, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """Our model and that of loralib, with equal weights."""
    kind, num_labels, targets, enable_lora = MODELS[case]
    theirs = with_loralib(small_model(kind, num_labels), LoraConfig(r=2, lora_alpha=4, targets=targets)).train()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.bin")
    return load_loralib(small_model(kind, num_labels), tmp_path / "lora.bin", 4, enable_lora, partial=True), theirs


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("case", MODELS)
def test_the_same_parameters_are_trained(case: str, bias: Bias, tmp_path: Path) -> None:
    ours, theirs = both(case, tmp_path)
    loralib.mark_only_lora_as_trainable(theirs, bias=bias)
    lora_hf.mark_only_lora_as_trainable(ours, bias=bias)
    expected = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    if bias != "all":  # neither trains the head; loralib leaves it to the script
        assert not [name for name in expected if name.startswith("classifier")]
    assert {their_name(name) for name, parameter in ours.named_parameters() if parameter.requires_grad} == expected
    assert {name for name, parameter in ours.named_parameters() if "lora_" in name and parameter.requires_grad}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("case", MODELS)
def test_the_state_dict_contains_the_same_tensors(case: str, bias: Bias, tmp_path: Path) -> None:
    ours, theirs = both(case, tmp_path)
    expected = loralib.lora_state_dict(theirs, bias=bias)
    found = lora_hf.lora_state_dict(ours, bias=bias)
    assert {their_name(name) for name in found} == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[their_name(name)]), name
        assert not tensor.requires_grad
        assert tensor.data_ptr() == ours.state_dict()[name].data_ptr(), "like that of loralib, it must not be a copy"


def test_load_state_dict_restores_a_saved_state_dict(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, targets=("q", "v"))
    ours = inject(small_model("gpt2"), lora)
    randomize_lora_b(ours)
    torch.save(lora_hf.lora_state_dict(ours), tmp_path / "lora.pt")
    again = inject(small_model("gpt2"), lora)
    result = again.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    for path, layer in lora_layers(ours).items():
        assert torch.equal(layer.delta_weight("default"), lora_layers(again)[path].delta_weight("default"))


def test_only_the_active_adapter_is_trained_and_saved() -> None:
    model = inject(small_model("roberta", 3), LoraConfig(r=2), name="idle")
    inject(model, LoraConfig(r=2), name="active")
    lora_hf.mark_only_lora_as_trainable(model, bias="all")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in [*trained, *lora_hf.lora_state_dict(model, bias="all")] if ".idle." in name]
    assert "classifier.modules_to_save.active.dense.bias" in trained
    assert lora_hf.mark_only_lora_as_trainable(lora_hf.set_adapter(model, None)) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_eval_changes_no_weight_although_that_of_loralib_merges(tmp_path: Path) -> None:
    ours, theirs = both("gpt2", tmp_path)
    name = "transformer.h.0.attn.c_attn"
    before = small_model("gpt2").get_submodule(name).weight
    for model in (ours, theirs):
        model.eval()
    assert torch.equal(ours.get_submodule(name).weight, before)
    assert not torch.equal(theirs.get_submodule(name).weight, before)


def test_tied_biases_are_saved_under_both_names() -> None:
    model = inject(small_model("gpt2"), LoraConfig(r=2, targets=("q", "o")))
    block = model.transformer.h
    block[1].ln_1.bias = block[0].ln_1.bias
    names = lora_hf.lora_state_dict(model, bias="all")
    assert {"transformer.h.0.ln_1.bias", "transformer.h.1.ln_1.bias"} <= names.keys()
