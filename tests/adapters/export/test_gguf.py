"""The GGUF file, rebuilt with the format's reader; and llama.cpp itself, where its Python package is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from lora_hf.adapters.export.contents import read_contents
from lora_hf.adapters.export.gguf import ARCHITECTURES, tensor_names
from lora_hf.adapters.export.targets import export_adapter
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.lora.inject import inject, lora_layers
from tests.support.export_checks import (
    IDS,
    LORA,
    llama_cpp_logits,
    our_logits,
    permute,
    save_base,
    save_random_adapter,
    write_base_gguf,
)
from tests.support.small_models import small_config
from tests.tolerances import EXPORT_DELTA, LLAMA_CPP_LOGITS

gguf = pytest.importorskip("gguf")

HEAD = LoraConfig(r=3, targets=("v", "lm_head"))
ENCODERS = ("bert", "roberta", "xlm-roberta")


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata, and `alpha / rank * lora_b @ lora_a` by the name of the tensor that llama.cpp adds it to."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {each.name: np.array(each.data).reshape(each.shape.tolist()[::-1]) for each in reader.tensors}
    names = {name.rpartition(".")[0] for name in tensors}
    pairs = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    return fields, {name: fields["adapter.lora.alpha"] / len(a) * b @ a for name, (a, b) in pairs.items()}


def in_their_order(model: Any, path: str, delta: torch.Tensor) -> torch.Tensor:
    """The rows as llama.cpp's conversion orders those of the base: conversion/llama.py, gptneox.py and bloom.py."""
    config, kind = model.config, model.config.model_type
    if kind in ("llama", "mistral", "granite", "smollm3") and path.endswith(("q_proj", "k_proj")):
        return permute(delta, config.num_attention_heads if "q_proj" in path else config.num_key_value_heads)
    if kind in ("gpt_neox", "bloom") and path.endswith("query_key_value"):
        heads = config.num_attention_heads
        parts = delta.reshape(heads, 3, -1, delta.shape[1])
        return torch.cat([parts[:, part].reshape(-1, delta.shape[1]) for part in range(3)])
    return delta


@pytest.mark.parametrize("kind", ["llama", "granite", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "bloom"])
def test_the_file_holds_the_update_of_every_tensor(kind: str, tmp_path: Path) -> None:
    """With rsLoRA, slices of fused projections, and ranks and alphas of some roles."""
    model = save_random_adapter(save_base(kind, tmp_path / "base"), tmp_path / "adapter")
    record = export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out")
    assert set(record.files) == {"adapter.gguf"}
    fields, deltas = read_gguf(tmp_path / "out" / "adapter.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ARCHITECTURES[kind].name
    names = tensor_names(read_contents(tmp_path / "adapter"))
    assert {f"{name}.weight" for _, name in names.values()} == deltas.keys()
    for path, layer in lora_layers(model).items():
        expected = in_their_order(model, path, layer.delta_weight("default").detach())
        found = torch.tensor(deltas[f"{names[path][1]}.weight"])
        assert torch.allclose(found, expected, atol=EXPORT_DELTA), path


def test_rows_in_the_order_of_transformers_would_be_wrong(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    model = save_random_adapter(save_base("llama", tmp_path / "base"), tmp_path / "adapter")
    delta = lora_layers(model)["model.layers.0.self_attn.q_proj"].delta_weight("default").detach()
    assert (permute(delta, 4) - delta).abs().max() > 100 * EXPORT_DELTA


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in ENCODERS])
def test_the_names_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    targets = ("q", "k", "v", "o") if kind in ("mixtral", "qwen2_moe", "qwen3_moe") else ("all",)
    model = save_random_adapter(save_base(kind, tmp_path / "base"), tmp_path / "adapter", LoraConfig(targets=targets))
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    theirs = gguf.get_tensor_name_map(architectures[ARCHITECTURES[kind].name], model.config.num_hidden_layers)
    for path, (_, name) in tensor_names(read_contents(tmp_path / "adapter")).items():
        assert theirs.get_name(path) == name


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_names_of_an_encoder_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    AutoModel.from_config(small_config(kind)).save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    save_adapter(inject(model, LoraConfig(targets=("all",))), tmp_path / "adapter")
    contents = read_contents(tmp_path / "adapter")
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    names = tensor_names(contents)
    assert len(names) == 12
    assert all(theirs.get_name(path) == name for path, (_, name) in names.items())
    export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out")


def test_an_output_head_of_its_own_is_exported(tmp_path: Path) -> None:
    model = save_random_adapter(save_base("llama", tmp_path / "base"), tmp_path / "adapter", HEAD)
    export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out")
    found = torch.tensor(read_gguf(tmp_path / "out" / "adapter.gguf")[1]["output.weight"])
    assert torch.allclose(found, lora_layers(model)["lm_head"].delta_weight("default").detach(), atol=EXPORT_DELTA)


@pytest.mark.parametrize(("kind", "lora"), [("llama", LORA), ("qwen2", LORA), ("gpt2", LORA), ("llama", HEAD)])
def test_llama_cpp_computes_the_same(kind: str, lora: LoraConfig, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, which builds from source, is not installed")
    model = save_random_adapter(save_base(kind, tmp_path / "base"), tmp_path / "adapter", lora)
    export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out")
    expected = our_logits(model, "default", IDS)
    plain = type(model).from_pretrained(tmp_path / "base")
    base = write_base_gguf(plain, tmp_path / "base.gguf")
    found = llama_cpp_logits(base, tmp_path / "out", IDS)
    assert np.abs(found - expected).max() <= LLAMA_CPP_LOGITS
    assert np.abs(llama_cpp_logits(base, None, IDS) - expected).max() > 100 * LLAMA_CPP_LOGITS


def test_a_module_without_a_counterpart_is_named(tmp_path: Path) -> None:
    base = save_base("qwen2_moe", tmp_path / "base")
    save_random_adapter(base, tmp_path / "adapter", LoraConfig(r=1, targets=("shared_expert_gate",)))
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.shared_expert_gate.*to=merged"):
        export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_adapter(save_base("llama", tmp_path / "base"), tmp_path / "adapter", LORA)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"the package gguf: .*\[export\]"):
        export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out")
