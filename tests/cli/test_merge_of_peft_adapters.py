"""PEFT records no task, and merging needs none."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_hf.core.records import MERGE_FILE, MergeRecord
from lora_hf.models.load import EMBEDDED_FOLDER
from tests.support.command_lines import ask
from tests.tolerances import MERGE_FP32

IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
@pytest.mark.parametrize("labels", [None, 1, 2, 5])
def test_it_gives_their_logits(labels: int | None, tmp_path: Path) -> None:
    causal = labels is None
    base = shutil.copytree(EMBEDDED_FOLDER / ("tiny-gpt2" if causal else "tiny-roberta"), tmp_path / "base")
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    head = {} if causal else {"num_labels": labels}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        r=4,
        target_modules=["c_attn"] if causal else ["query", "value"],
        fan_in_fan_out=causal,
    )
    theirs = peft.get_peft_model(auto.from_pretrained(base, **head), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    said = ask("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged").stderr
    assert "records no tokenizer" in said
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    if not causal:
        assert merged.config.num_labels == labels
    assert torch.allclose(merged(IDS).logits, theirs(IDS).logits, atol=MERGE_FP32)
    assert MergeRecord.load(tmp_path / "merged" / MERGE_FILE).task == "unrecorded"
    text = "predict" if not causal else "generate"
    option = "--text" if not causal else "--prompt"
    assert "unrecorded" in ask(text, "--adapter", tmp_path / "merged", option, "x", code=2).stderr


def test_a_verb_that_needs_a_task_says_so(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER / "tiny-gpt2")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    said = ask("generate", "--adapter", tmp_path / "adapter", "--prompt", "x", code=2).stderr
    assert "which task" in said


def test_another_kind_of_head_is_still_refused(tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(EMBEDDED_FOLDER / "tiny-roberta")
    config = peft.LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["query"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    said = ask("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", code=2).stderr
    assert "which task" in said
