"""Which of our adapters vLLM, LoRAX and text-generation-inference can serve, by the checks in their source code.

vLLM: `vllm/lora/peft_helper.py` and `lora_model.py`. LoRAX and text-generation-inference: `adapters/lora.py`. None of
them reads `rank_pattern` or `alpha_pattern`: all modules get the same scaling `lora_alpha / r`.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file

from lora_hf import LoraConfig, inject, save_adapter
from tests.support.small_models import randomize_lora_b, small_model

START = "base_model.model."
LINEARS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}


def vllm_problems(folder: Path, kind: str) -> list[str]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    problems = [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    problems += ["modules_to_save"] if config.get("modules_to_save") else []
    problems += ["use_dora"] if config.get("use_dora") else []
    problems += ["bias"] if config.get("bias", "none") != "none" else []
    for name in load_file(folder / "adapter_model.safetensors"):
        *module, factor, weight = name.removeprefix(START).split(".")
        if (factor, weight) not in (("lora_A", "weight"), ("lora_B", "weight")):
            problems.append(f"{name} is not a LoRA weight")
        elif module[-1] not in LINEARS[kind]:
            problems.append(f"{module[-1]} does not support LoRA")
    return problems + scaling_problems(folder)


def lorax_problems(folder: Path) -> list[str]:
    """The checks of LoRAX, which text-generation-inference shares."""
    config = peft.LoraConfig.from_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    problems = [f"{name} is ignored" for name in tensors if ".lora_" not in name]
    for module in modules:
        down, up = tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")
        if down is None or up is None or down.shape[0] != up.shape[1] or not module.startswith(START):
            problems.append(f"{module} lacks a factor")
    return problems + (["use_dora"] if config.use_dora else []) + scaling_problems(folder)


def scaling_problems(folder: Path) -> list[str]:
    """Whether the modules of the adapter need different scalings."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = {
        value.shape[0] for name, value in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in name
    }
    return ["patterns"] if config["rank_pattern"] or config["alpha_pattern"] or ranks != {config["r"]} else []


def saved(folder: Path, kind: str, lora: LoraConfig, labels: int | None = None) -> Path:
    model = inject(small_model(kind, labels), lora)
    randomize_lora_b(model)
    return save_adapter(model, folder)


@pytest.mark.parametrize(("kind", "targets"), [("llama", ("q", "v")), ("llama", ("all",)), ("gpt2", ("q", "v"))])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_causal_lms_are_served(kind: str, targets: tuple[str, ...], use_rslora: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, LoraConfig(r=4, lora_alpha=8, targets=targets, use_rslora=use_rslora))
    assert vllm_problems(folder, kind) == []
    assert lorax_problems(folder) == []


@pytest.mark.parametrize(
    ("kind", "lora", "labels", "problem"),
    [
        ("llama", LoraConfig(r=4, use_dora=True), None, "use_dora"),
        ("gpt2", LoraConfig(r=4, bias="lora_only"), None, "bias"),
        ("llama", LoraConfig(r=4, rank_pattern={"v": 2}), None, "patterns"),
        ("llama", LoraConfig(r=4), 2, "modules_to_save"),
    ],
)
def test_unsupported_adapters_are_known(
    kind: str, lora: LoraConfig, labels: int | None, problem: str, tmp_path: Path
) -> None:
    assert problem in vllm_problems(saved(tmp_path, kind, lora, labels), kind)


def test_adapted_slices_of_a_fused_projection_have_a_higher_rank_than_other_modules(tmp_path: Path) -> None:
    """PEFT's format has no slices, so q, k and v of GPT-2's c_attn become one product of three times the rank."""
    folder = saved(tmp_path, "gpt2", LoraConfig(r=4, targets=("all",)))
    assert vllm_problems(folder, "gpt2") == lorax_problems(folder) == ["patterns"]
