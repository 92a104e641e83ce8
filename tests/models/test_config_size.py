"""A config.json of absurd sizes is refused before anything is built, and an unusual one is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_hf.core.config.schema import ModelConfig
from lora_hf.core.errors import ModelError
from lora_hf.data.tasks.base import ModelKind
from lora_hf.models.config_size import check_size
from lora_hf.models.load import BUNDLED_FOLDER, load_model

HUGE = 10**9


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("base", "sizes"),
    [
        ("tiny-roberta", {"num_hidden_layers": HUGE}),
        ("tiny-roberta", {"num_hidden_layers": 1e300}),
        ("tiny-roberta", {"hidden_size": 768 * 10**6, "num_attention_heads": 12}),
        ("tiny-roberta", {"hidden_size": HUGE}),
        ("tiny-roberta", {"intermediate_size": HUGE}),
        ("tiny-roberta", {"vocab_size": HUGE}),
        ("tiny-roberta", {"max_position_embeddings": HUGE}),
        ("tiny-gpt2", {"n_layer": HUGE}),
        ("tiny-gpt2", {"n_embd": 4 * 10**8}),
        ("tiny-gpt2", {"n_inner": HUGE}),
        ("tiny-gpt2", {"vocab_size": 10**18}),
    ],
)
def test_it_is_refused_with_the_size(base: str, sizes: dict[str, Any], init: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUNDLED_FOLDER / base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))
    kind: ModelKind = "sequence-classification" if base == "tiny-roberta" else "causal-lm"
    with pytest.raises(ModelError) as error:
        load_model(ModelConfig(name=str(folder), precision="fp32", init=init), kind)
    assert str(folder) in str(error.value)
    assert next(iter(sizes)) in str(error.value)


def test_layers_that_a_config_class_lists_are_refused_first(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "num_hidden_layers": HUGE, "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"num_hidden_layers: expected at most .* found 1,000,000,000"):
        load_model(ModelConfig(name=str(tmp_path), precision="fp32"), "causal-lm")


@pytest.mark.parametrize(
    ("auto", "kind", "sizes"),
    [
        (AutoModelForCausalLM, "llama", {"max_position_embeddings": 10_000_000, "rope_theta": 500_000}),
        (AutoModelForCausalLM, "llama", {"vocab_size": 256_000, "hidden_size": 64, "intermediate_size": 28_672}),
        (AutoModelForSequenceClassification, "xlm-roberta", {"vocab_size": 250_002}),
        (AutoModelForCausalLM, "gpt2", {}),
    ],
)
def test_usual_sizes_pass(auto: Any, kind: str, sizes: dict[str, Any]) -> None:
    small = {"num_hidden_layers": 1, "num_attention_heads": 4}
    check_size(auto, AutoConfig.for_model(kind, **(small | sizes)), torch.float32, "a base")
