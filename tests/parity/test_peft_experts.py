"""Models whose experts were projections before transformers 5: PEFT takes others of these names for theirs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError
from lora_hf.lora.inject import inject, lora_layers
from tests.support.small_models import randomize_lora_b, small_config, token_ids
from tests.tolerances import PEFT_LOGITS

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
PROJECTIONS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=["deepseek_v3", "qwen2_moe", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = request.param
    config = AutoConfig.for_model(kind, **DEEPSEEK) if kind == "deepseek_v3" else small_config(kind)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    return tmp_path / kind


def load(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"targets": PROJECTIONS},
        {"targets": PROJECTIONS, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"targets": ("up_proj",), "lora_dropout": 0.5},
    ],
)
def test_peft_reads_the_projections_beside_the_experts_from_our_file(
    base: Path, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = inject(load(base), LoraConfig(r=4, **options)).eval()
    randomize_lora_b(model)
    logits = model(token_ids()).logits
    caplog.clear()
    save_adapter(model, tmp_path / "adapter")
    file = read_adapter(tmp_path / "adapter")
    beside = {f"{path}.weight" for path in lora_layers(model) if path.endswith(("gate_proj", "up_proj", "down_proj"))}
    assert set(file.config.get("target_parameters") or ()) == (set() if base.name == "llama" else beside)
    drops = base.name != "llama" and "lora_dropout" in options
    assert ("lora_dropout=0.5 is not saved" in caplog.text) is drops
    assert torch.equal(load_adapter(load(base), tmp_path / "adapter")(token_ids()).logits, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # among others, its check of the patterns overlooks target_parameters
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    assert torch.allclose(theirs(token_ids()).logits, logits, atol=PEFT_LOGITS, rtol=0)


def test_an_adapter_of_the_experts_themselves_is_refused_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("deepseek_v3", **DEEPSEEK)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    peft.get_peft_model(load(tmp_path / "base"), lora).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(AdapterError, match=r"target_parameters='experts\.down_proj' not supported"):
        load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
