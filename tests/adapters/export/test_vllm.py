"""The folder for vLLM is a PEFT adapter with one rank, so lora_hf and PEFT read it too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_hf.adapters.export.targets import export_adapter
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError
from lora_hf.lora.inject import adapter_heads, inject
from tests.support.export_checks import save_base, save_random_adapter
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import PARITY_FP32


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_one_rank_and_scaling_compute_the_same(kind: str, tmp_path: Path) -> None:
    base = save_base(kind, tmp_path / "base")
    expected = save_random_adapter(base, tmp_path / "adapter")(token_ids()).logits
    export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}
    for load in (load_adapter, PeftModel.from_pretrained):
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        found = load(model, tmp_path / "out")(input_ids=token_ids()).logits
        assert torch.allclose(found, expected, atol=PARITY_FP32)


def classifier(kind: str, folder: Path) -> None:
    """An adapter with a head for three labels, and its base, a language model."""
    model = small_model(kind, 3)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    inject(model, LoraConfig(r=2, targets=("q",)))
    randomize_lora_b(model)
    for head in adapter_heads(model).values():
        for parameter in head.modules_to_save["default"].parameters():
            torch.nn.init.normal_(parameter)
    save_adapter(model, folder / "adapter")


def test_a_head_of_one_projection_stays_with_its_labels(tmp_path: Path) -> None:
    classifier("llama", tmp_path)
    record = export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    head = "base_model.model.score.weight"
    assert torch.equal(after[head], before[head])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    assert "LlamaForSequenceClassification" in record.notes[0]
    assert '"num_labels": 3' in record.notes[0]


def test_a_head_of_two_projections_is_refused(tmp_path: Path) -> None:
    classifier("roberta", tmp_path)
    with pytest.raises(AdapterError, match=r"a roberta; .*to=merged"):
        export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out")


def test_vllm_accepts_the_config(tmp_path: Path) -> None:
    helper = pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed").PEFTHelper
    save_random_adapter(save_base("llama", tmp_path / "base"), tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out")
    read = helper.from_local_dir(str(tmp_path / "out"), 64)
    assert not read._validate_features()
    assert read.vllm_lora_scaling_factor == pytest.approx(read.lora_alpha / read.r)
