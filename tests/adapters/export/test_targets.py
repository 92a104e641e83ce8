"""What each target refuses, by name and with the next step; and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lora_hf.adapters.export.targets import TARGETS, export_adapter
from lora_hf.adapters.format import read_adapter, write_adapter
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.core.records import EXPORT_FILE, ExportRecord
from lora_hf.lora.inject import adapter_state, inject
from lora_hf.lora.variants.tokens import add_token_rows
from tests.support.command_lines import ask, last_json
from tests.support.export_checks import save_base
from tests.support.random_adapters import save_random
from tests.support.small_models import randomize_lora_b, small_model

pytest.importorskip("gguf")

# What an adapter holds besides A and B: its config, the words of the refusal, and the targets that hold it.
EXTRAS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "dora": ({"use_dora": True}, "DoRA magnitudes (model.layers.0.self_attn.q_proj", ("mlx",)),
    "bias": ({"bias": "lora_only"}, "trained biases (model.layers.0.self_attn.q_proj", ()),
    "whole": ({"modules_to_save": ("norm",)}, "fully trained modules (model.norm)", ()),
    "embeddings": ({"targets": ("q", "embeddings")}, "adapted embeddings (model.embed_tokens)", ()),
}
WRITERS = [target for target in TARGETS if target not in ("merged", "ollama")]


def save(folder: Path, kind: str = "qwen2", rows: bool = False, **lora: Any) -> Path:
    base = save_base(kind, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.name_or_path = str(base)
    inject(model, LoraConfig(**{"r": 2, "targets": ("q",), **lora}))
    if rows:
        add_token_rows(model, {"model.embed_tokens": [7, 9]}, "default", adapter_state(model))
    randomize_lora_b(model)
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_a_target_drops_is_refused_by_name(target: str, extra: str, tmp_path: Path) -> None:
    lora, words, holds = EXTRAS[extra]
    adapter = save(tmp_path, **lora)
    if target in holds:
        export_adapter(adapter, target, tmp_path / "out")
        return
    with pytest.raises(AdapterError) as caught:
        export_adapter(adapter, target, tmp_path / "out")
    assert f"{target} would drop {words}" in str(caught.value)
    assert "to=merged" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", WRITERS)
def test_rows_of_tokens_have_no_export_at_all(target: str, tmp_path: Path) -> None:
    adapter = save(tmp_path, rows=True)
    with pytest.raises(AdapterError, match=r"rows of single tokens \(model\.embed_tokens\)") as caught:
        export_adapter(adapter, target, tmp_path / "out")
    assert "to=merged" not in str(caught.value)


@pytest.mark.parametrize("target", WRITERS)
def test_an_unknown_model_type_is_refused(target: str, tmp_path: Path) -> None:
    adapter = save(tmp_path, "codegen", targets=("all-linear",))
    with pytest.raises(AdapterError, match=r"is a codegen; .* are written for .*llama"):
        export_adapter(adapter, target, tmp_path / "out")


def test_a_head_that_is_the_embeddings_is_refused(tmp_path: Path) -> None:
    base = small_model("qwen2", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    inject(base, LoraConfig(r=2, targets=("q", "lm_head")))
    randomize_lora_b(base)
    save_adapter(base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"the output head too \(lm_head\).*cannot be merged"):
        export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out")


def test_pissa_of_lora_hf_is_plain_and_that_of_peft_is_refused(tmp_path: Path) -> None:
    adapter = save(tmp_path, init_lora_weights="pissa")
    export_adapter(adapter, "gguf", tmp_path / "out")
    file = read_adapter(adapter)
    config = {**file.config, "init_lora_weights": "pissa"}
    write_adapter(tmp_path / "peft", config, file.tensors, replace(file.metadata, start=""))
    with pytest.raises(AdapterError, match=r"pissa.*save_adapter"):
        export_adapter(tmp_path / "peft", "gguf", tmp_path / "other")


def test_arguments_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'gguf'"):
        export_adapter(tmp_path, "guff", tmp_path / "out")
    with pytest.raises(ConfigError, match="only with to=ollama"):
        export_adapter(tmp_path, "gguf", tmp_path / "out", ollama_base="llama3.2")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save(tmp_path)
    words = ["export", "--adapter", adapter, "--output", tmp_path / "out", "--to"]
    printed = ask(*words, "gguf").stdout
    assert "adapter.gguf" in printed
    assert "llama-cli" in printed
    assert ExportRecord.load(tmp_path / "out" / EXPORT_FILE).target == "gguf"
    result = last_json(ask(*words, "mlx", "--overwrite", "--json"))
    assert (result["target"], sorted(result["files"])) == ("mlx", ["adapter_config.json", "adapters.safetensors"])
    refused = ask(*words, "vllm", code=2)
    assert "pass --overwrite" in refused.stderr


def test_merged_is_what_merge_writes(tmp_path: Path) -> None:
    save_random(tmp_path / "adapter", "rule-sentiment")
    record = export_adapter(tmp_path / "adapter", "merged", tmp_path / "out")
    assert {"model.safetensors", "config.json", "merge.json"} <= record.files.keys()
