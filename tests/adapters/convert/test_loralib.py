"""Against real loralib models: equal logits and gradients after conversion, both ways, and files bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from lora_hf.adapters.convert.loralib import load_loralib, loralib_layers, loralib_state_dict, save_loralib
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError
from lora_hf.lora.inject import adapter_names, add_weights, inject, lora_layers, set_adapter
from lora_hf.lora.layers import LoraWeights
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import PARITY_FP32
from tools.benchmark.peers import with_loralib

ALPHA = 6
Q_AND_V, ALL_THREE = (True, False, True), (True, True, True)
# Model, labels, what is adapted, the enable_lora that the conversion needs.
CASES: dict[str, tuple[str, int | None, tuple[str, ...], tuple[bool, ...] | None]] = {
    "Linear": ("roberta", 3, ("q", "v", "ffn"), None),
    "Linear with a head of two modules": ("deberta-v2", 2, ("q", "v"), None),
    "Linear on Conv1D": ("gpt2", None, ("o", "ffn"), None),
    "MergedLinear q v": ("gpt2", None, ("q", "v"), Q_AND_V),
    "MergedLinear k": ("gpt2", None, ("k",), (False, True, False)),
    "MergedLinear q k v beside Linear": ("gpt2", 3, ("all",), ALL_THREE),
    "llama": ("llama", None, ("all",), None),
}


def trained_loralib(kind: str, num_labels: int | None, targets: tuple[str, ...], r: int = 4) -> nn.Module:
    """A loralib model, in train mode (its eval() merges), with values as training leaves them."""
    model = with_loralib(small_model(kind, num_labels), LoraConfig(r=r, lora_alpha=ALPHA, targets=targets)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def checkpoint(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained: loralib's own state dict, and the head as the paper's NLU code saves it."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert loralib.lora_state_dict(model).keys() <= trained.keys()
    return trained


def saved(tensors: dict[str, Any], folder: Path) -> Path:
    torch.save(tensors, folder / "lora.bin")
    return folder / "lora.bin"


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """By loralib's names."""
    model.zero_grad()
    model(ids).logits.pow(2).mean().backward()
    names = {
        name.replace(".adapters.default", "").replace(".modules_to_save.default", ""): parameter
        for name, parameter in model.named_parameters()
    }
    return {name: parameter.grad for name, parameter in names.items() if parameter.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_loralibs(case: str, tmp_path: Path) -> None:
    kind, num_labels, targets, enable_lora = CASES[case]
    theirs, ids = trained_loralib(kind, num_labels, targets), token_ids()
    ours = load_loralib(small_model(kind, num_labels), saved(checkpoint(theirs), tmp_path), ALPHA, enable_lora)
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=PARITY_FP32, rtol=0)
    expected, found = gradients(theirs, ids), gradients(ours, ids)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.allclose(found[name], gradient, atol=PARITY_FP32, rtol=0), name
    for weights in (layer.adapters["default"] for layer in lora_layers(ours).values()):
        weights.lora_alpha *= 2
    assert not torch.allclose(ours(ids).logits, theirs(ids).logits, atol=100 * PARITY_FP32, rtol=0), "alpha must matter"


def test_another_enable_lora_gives_another_model(tmp_path: Path) -> None:
    theirs, ids = trained_loralib("gpt2", None, ("q", "v")), token_ids()
    file = saved(checkpoint(theirs), tmp_path)
    wrong = load_loralib(small_model("gpt2"), file, ALPHA, (True, True, False))
    assert not torch.allclose(wrong(ids).logits, theirs(ids).logits, atol=100 * PARITY_FP32, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_loralib_model_takes_the_state_dict_and_answers_alike(case: str, tmp_path: Path) -> None:
    kind, num_labels, targets, _ = CASES[case]
    ours, ids = inject(small_model(kind, num_labels), LoraConfig(r=2, lora_alpha=ALPHA, targets=targets)), token_ids()
    randomize_lora_b(ours)
    for name, parameter in ours.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter, std=0.3)
    save_loralib(ours, tmp_path / "lora.bin")
    assert [file.name for file in tmp_path.iterdir()] == ["lora.bin"]
    tensors = torch.load(tmp_path / "lora.bin", weights_only=True)
    theirs = trained_loralib(kind, num_labels, targets, r=2)
    lost = theirs.load_state_dict(tensors, strict=False)
    assert not lost.unexpected_keys
    assert not [key for key in lost.missing_keys if "lora_" in key or key.startswith(("classifier", "score", "pooler"))]
    assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=PARITY_FP32, rtol=0)
    for path, layer in loralib_layers(ours).items():
        module = theirs.get_submodule(path)
        built = eval(str(layer), {"lora": loralib})
        assert (type(built), built.r, built.lora_alpha) == (type(module), module.r, module.lora_alpha), path
        assert getattr(built, "enable_lora", None) == getattr(module, "enable_lora", None), path
        assert (built.weight.shape, built.fan_in_fan_out) == (module.weight.shape, module.fan_in_fan_out), path


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_for_bit(case: str, tmp_path: Path) -> None:
    kind, num_labels, targets, enable_lora = CASES[case]
    tensors = checkpoint(trained_loralib(kind, num_labels, targets))
    model = load_loralib(small_model(kind, num_labels), saved(tensors, tmp_path), ALPHA, enable_lora)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(small_model(kind, num_labels), tmp_path / "adapter")
    found = loralib_state_dict(again)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


NAMINGS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]] = {
    "the paper's GPT-2 code": lambda t: {"model_state_dict": {f"module.{key}": t[key] for key in t}},
    "one GPU": lambda t: {"model_state_dict": t},
    "the bare base model": lambda t: {key.removeprefix("transformer."): t[key] for key in t},
    "half precision": lambda t: {key: t[key].half().float() for key in t},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_names_of_published_checkpoints_are_understood(naming: str, tmp_path: Path) -> None:
    tensors = {
        key: value.half().float() for key, value in checkpoint(trained_loralib("gpt2", None, ("q", "v"))).items()
    }
    file = saved(NAMINGS[naming](tensors), tmp_path)
    found = loralib_state_dict(load_loralib(small_model("gpt2"), file, ALPHA, Q_AND_V))
    assert next(iter(tensors)) == "transformer.h.0.attn.c_attn.lora_A"
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_whole_checkpoint_is_understood_where_its_base_is_this_one(tmp_path: Path) -> None:
    theirs = trained_loralib("roberta", 3, ("q", "v"))
    whole = dict(theirs.state_dict()) | {"roberta.embeddings.position_ids": torch.arange(512).expand(1, -1)}
    model = load_loralib(small_model("roberta", 3), saved(whole, tmp_path), ALPHA)
    assert torch.equal(loralib_state_dict(model)["classifier.dense.weight"], whole["classifier.dense.weight"])
    key = "roberta.encoder.layer.1.attention.self.query.bias"
    with pytest.raises(AdapterError, match=rf"1 tensors of the base differ from this model \({key}\)"):
        load_loralib(small_model("roberta", 3), saved(whole | {key: whole[key] + 1}, tmp_path), ALPHA)


def test_a_file_without_head_or_with_some_layers_needs_partial(tmp_path: Path) -> None:
    theirs = trained_loralib("roberta", 3, ("q",))
    file = saved(loralib.lora_state_dict(theirs), tmp_path)
    with pytest.raises(AdapterError, match=r"missing: classifier.dense.weight \(32, 32\)"):
        load_loralib(small_model("roberta", 3), file, ALPHA)
    plain = small_model("roberta", 3)
    model = load_loralib(small_model("roberta", 3), file, ALPHA, partial=True)
    head = loralib_state_dict(model)["classifier.dense.weight"]
    assert torch.equal(head, plain.classifier.dense.weight)
    first = {key: value for key, value in checkpoint(theirs).items() if ".layer.1." not in key}
    with pytest.raises(AdapterError, match=r"missing: roberta.encoder.layer.1.attention.self.query.lora_A \(4, 32\)"):
        load_loralib(small_model("roberta", 3), saved(first, tmp_path), ALPHA)
    model = load_loralib(small_model("roberta", 3), saved(first, tmp_path), ALPHA, partial=True)
    assert list(lora_layers(model)) == ["roberta.encoder.layer.0.attention.self.query"]


def test_a_checkpoint_joins_an_adapter_that_is_there(tmp_path: Path) -> None:
    theirs, ids = trained_loralib("roberta", 3, ("q", "v")), token_ids()
    model = inject(small_model("roberta", 3), LoraConfig(r=2), name="first")
    load_loralib(model, saved(checkpoint(theirs), tmp_path), ALPHA, name="theirs")
    assert adapter_names(model) == ["first", "theirs"]
    assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=PARITY_FP32, rtol=0)
    assert torch.equal(set_adapter(model, "first")(ids).logits, small_model("roberta", 3)(ids).logits)


# What must be refused: the model, the change to a good checkpoint, the message.

A, B = (f"roberta.encoder.layer.0.attention.self.query.lora_{part}" for part in "AB")
C_ATTN = "transformer.h.0.attn.c_attn"
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "no lora_B": ("roberta", {}, {B: None}, f"missing: {B} (32, 4)"),
    "no lora_A": ("roberta", {}, {A: None}, f"missing: {A} (4, 32)"),
    "half a head": ("roberta", {}, {"classifier.out_proj.bias": None}, "missing: classifier.out_proj.bias (3,)"),
    "another head": (
        "roberta",
        {},
        {"classifier.out_proj.weight": torch.ones(2, 32)},
        "wrong shape: classifier.out_proj.weight: expected (3, 32), found (2, 32)",
    ),
    "an unknown tensor": ("roberta", {}, {"stray": torch.ones(2)}, "extra: stray (2,)"),
    "another width": ("roberta", {}, {A: torch.ones(4, 48)}, f"wrong shape: {A}: expected (4, 32), found (4, 48)"),
    "ranks that do not fit": ("roberta", {}, {A: torch.ones(7, 32)}, f"{A}: expected (4, 32), found (7, 32)"),
    "ranks as of a MergedLinear": ("roberta", {}, {A: torch.ones(8, 32)}, "adapts 2 of 2 slices"),
    "no matrix": ("roberta", {}, {A: torch.ones(8)}, "expected two matrices of one rank, found lora_A (8,)"),
    "a rank of zero": (
        "roberta",
        {},
        {A: torch.ones(0, 32), B: torch.ones(32, 0)},
        "expected two matrices of one rank, found lora_A (0, 32) and lora_B (32, 0)",
    ),
    "an Embedding": (
        "roberta",
        {},
        {"roberta.embeddings.word_embeddings.lora_A": torch.ones(4, 100)},
        "expected an nn.Linear or Conv1D of the model, found Embedding",
    ),
    "a layer too many": (
        "roberta",
        {},
        {A.replace("layer.0", "layer.7"): torch.ones(4, 32)},
        "expected an nn.Linear or Conv1D of the model, found no such module",
    ),
    "enable_lora for nothing": ("roberta", {"enable_lora": [True]}, {}, "no layer in the file is a lora.MergedLinear"),
    "no enable_lora": ("gpt2", {"enable_lora": None}, {}, f"{C_ATTN}: lora_A (8, 32) and lora_B (64, 4) are those"),
    "too few enabled": (
        "gpt2",
        {"enable_lora": (True, False, False)},
        {},
        f"wrong shape: {C_ATTN}.lora_A: expected (4, 32), found (8, 32)",
    ),
    "none enabled": ("gpt2", {"enable_lora": (False, False)}, {}, "expected an enable_lora with a True"),
    "an odd enable_lora": ("gpt2", {"enable_lora": (True,) * 5}, {}, "of a length that divides 96"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_the_model_left_alone(case: str, tmp_path: Path) -> None:
    kind, more, changes, message = REFUSED[case]
    num_labels = 3 if kind == "roberta" else None
    tensors = checkpoint(trained_loralib(kind, num_labels, ("q", "v"))) | changes
    file = saved({key: value for key, value in tensors.items() if value is not None}, tmp_path)
    model = small_model(kind, num_labels)
    modules = [path for path, _ in model.named_modules()]
    with pytest.raises(AdapterError) as error:
        load_loralib(model, file, ALPHA, **({"enable_lora": Q_AND_V} if kind == "gpt2" else {}) | more)
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert [path for path, _ in model.named_modules()] == modules


def test_what_loralib_cannot_compute_is_not_written(tmp_path: Path) -> None:
    class Magnitude(LoraWeights):
        pass

    path, file = "transformer.h.0.attn.c_attn", tmp_path / "lora.bin"
    model = inject(small_model("gpt2"), LoraConfig(r=2, targets=("q",)))
    layer = lora_layers(model)[path]
    layer.adapters["default"] = Magnitude(32, [(0, 32)], 2, 4)
    with pytest.raises(AdapterError, match="c_attn holds Magnitude, scaled by 2: loralib supports only plain LoRA"):
        save_loralib(model, file)
    for slices in ([(0, 32), (32, 96)], [(16, 48)], [(64, 96), (0, 32)]):
        add_weights(model, path, "odd", slices, 2, 4)
        with pytest.raises(AdapterError, match="loralib's MergedLinear supports only equal shares"):
            save_loralib(model, file, "odd")
    with pytest.raises(AdapterError, match="no adapter 'x' with LoRA on this model; it has: default, odd"):
        save_loralib(model, file, "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="cannot be written: No such file"):
        save_loralib(inject(small_model("gpt2"), LoraConfig()), tmp_path / "nowhere" / "lora.bin")
