"""Two real pretrained models: MiniLM (BERT, 22.7 M parameters) and SmolLM2-135M-Instruct (Llama)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from lora_hf import LoraConfig, eject, inject, load_adapter, merge, save_adapter
from lora_hf.cli.main import main
from tests.support.small_models import randomize_lora_b
from tests.tolerances import PRETRAINED_LOGITS_RTOL

pytestmark = pytest.mark.full

TEXTS = ["A warm and funny film.", "It never comes together, and it is far too long.", "Who plays the detective?"]
MODELS = [
    pytest.param("minilm", AutoModelForSequenceClassification, id="minilm-classes"),
    pytest.param("minilm", AutoModelForQuestionAnswering, id="minilm-answers"),
    pytest.param("smollm2", AutoModelForCausalLM, id="smollm2-text"),
]


def outputs(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    output = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"))
    found = [output[name] for name in ("logits", "start_logits", "end_logits") if name in output]
    return torch.cat([each.flatten() for each in found])


def fresh(auto: Any, folder: Path, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "auto"), MODELS)
def test_an_adapter_gives_the_same_outputs_everywhere(name: str, auto: Any, real_models: Path, tmp_path: Path) -> None:
    base = real_models / name
    model = inject(fresh(auto, base, 1), LoraConfig(r=4, targets=("all",)))
    randomize_lora_b(model, std=0.01)
    expected = outputs(model, base)
    scale = float(expected.abs().max())
    save_adapter(model, tmp_path)
    assert torch.equal(outputs(load_adapter(fresh(auto, base, 2), tmp_path), base), expected)
    theirs = peft.PeftModel.from_pretrained(fresh(auto, base, 3), str(tmp_path))
    atol = PRETRAINED_LOGITS_RTOL * scale
    assert torch.allclose(outputs(theirs.get_base_model().eval(), base), expected, rtol=0, atol=atol)
    assert torch.allclose(outputs(eject(merge(model)).eval(), base), expected, rtol=0, atol=atol)
    assert not torch.allclose(outputs(fresh(auto, base, 1), base), expected, rtol=0, atol=1e-3 * scale)


def test_minilm_learns_sst2_from_the_command_line(
    real_models: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"model.name={real_models / 'minilm'}", "model.precision=fp32", f"task.data_dir={data_dir}"]
    options += [
        "lora.targets=all",
        "train.lr=1e-3",
        "task.train_rows=2000",
        "train.max_steps=60",
        f"output.dir={tmp_path}",
        "output.plots=false",
        "output.name=run",
    ]
    assert main(["train", "--config", "glue_sst2.yaml", "--json", *options]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["validation"]
    assert metrics["accuracy"] > 0.6, "half of the labels are right by chance"
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:2]), encoding="utf-8")
    words = ["--adapter", str(tmp_path / "run/adapter"), "--input", str(tmp_path / "texts.txt")]
    assert main(["predict", *words]) == 0
    answers = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert answers == ["positive", "negative"]


def test_smollm2_merges_in_bf16(real_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = real_models / "smollm2"
    model = inject(fresh(AutoModelForCausalLM, base, 1), LoraConfig(r=8, targets=("all",)))
    randomize_lora_b(model, std=0.02)
    save_adapter(model, tmp_path / "adapter", task="rule-restaurants")
    words = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--dtype", "bf16"]
    assert main(["merge", *words]) == 0, "a warning at most: rounding 135 M weights moves the logits"
    assert (tmp_path / "merged/model.safetensors").is_file()
