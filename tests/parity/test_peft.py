"""Parity with peft for equal weights: logits, gradients, optimizer steps, and files in both directions."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.inject import inject, lora_layers
from tests.support.peft_parameters import paired_parameters
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import FILE_ROUNDTRIP, PARITY_FP32

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
STEPS, ROWS = 20, 8


def peft_model(base: nn.Module, r: int = 8, alpha: int = 16) -> nn.Module:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGETS)
    return peft.get_peft_model(base, config)


def batches(data_dir: Path, models_dir: Path) -> list[dict[str, torch.Tensor]]:
    """`STEPS` batches of SST-2 rows, tokenized with the tokenizer of RoBERTa."""
    rows = Dataset.from_parquet(str(data_dir / "glue/sst2/train.parquet"))[: STEPS * ROWS]
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "roberta-base-tokenizer")
    result = []
    for start in range(0, STEPS * ROWS, ROWS):
        batch = dict(tokenizer(rows["sentence"][start : start + ROWS], padding=True, return_tensors="pt"))
        result.append(batch | {"labels": torch.tensor(rows["label"][start : start + ROWS])})
    return result


@pytest.mark.full
def test_logits_gradients_and_twenty_adamw_steps_equal_those_of_peft(data_dir: Path, models_dir: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **shape)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    base = RobertaForSequenceClassification(config)
    theirs = peft_model(copy.deepcopy(base)).train()
    ours = inject(base, LoraConfig(r=8, lora_alpha=16, targets=("all",))).train()
    both = paired_parameters(ours, theirs)
    assert len(both) == 3 * 6 * 2 + 4
    assert len(both) == sum(parameter.requires_grad for parameter in theirs.parameters())
    for parameter, other in both.values():
        values = torch.randn(parameter.shape) * 0.02
        parameter.data.copy_(values)
        other.data.copy_(values)
    optimizers = [torch.optim.AdamW([pair[side] for pair in both.values()], lr=1e-3) for side in (0, 1)]
    start = {name: pair[0].detach().clone() for name, pair in both.items()}
    for batch in batches(data_dir, models_dir):
        outputs = [model(**batch) for model in (ours, theirs)]
        assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=PARITY_FP32, rtol=0)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
        for name, (parameter, other) in both.items():
            assert parameter.grad.any(), name
            assert torch.allclose(parameter.grad, other.grad, atol=PARITY_FP32, rtol=0), name
        for optimizer in optimizers:
            optimizer.step()
    for name, (parameter, other) in both.items():
        assert torch.allclose(parameter, other, atol=PARITY_FP32, rtol=0), name
        assert not torch.allclose(parameter, start[name], atol=100 * PARITY_FP32, rtol=0), "the parameter must change"


def test_we_load_adapters_saved_by_peft(tmp_path: Path) -> None:
    theirs = peft_model(small_model("roberta", 3)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours, plain = load_adapter(small_model("roberta", 3), tmp_path), small_model("roberta", 3)
    assert torch.allclose(ours(token_ids()).logits, theirs(token_ids()).logits, atol=FILE_ROUNDTRIP, rtol=0)
    assert not torch.allclose(ours(token_ids()).logits, plain(token_ids()).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "num_labels", "lora"),
    [
        ("roberta", 3, LoraConfig(r=4, lora_alpha=6, targets=("all",))),
        ("distilbert", 2, LoraConfig(r=4, targets=("q", "v"))),
        ("bert", 2, LoraConfig(r=4, targets=("ffn",))),
        ("deberta-v2", 2, LoraConfig(r=4, targets=("attention",))),
        ("gpt2", None, LoraConfig(r=4, lora_alpha=32, targets=("q", "v"))),
        ("gpt2", 3, LoraConfig(r=2, targets=("k", "ffn"))),
        ("llama", None, LoraConfig(r=4, targets=("all",))),
    ],
)
def test_peft_loads_our_adapters(kind: str, num_labels: int | None, lora: LoraConfig, tmp_path: Path) -> None:
    model, ids = inject(small_model(kind, num_labels), lora), token_ids()
    randomize_lora_b(model)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_model(kind, num_labels), str(tmp_path)).eval()
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=FILE_ROUNDTRIP, rtol=0)
    adapted = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(lora_layers(model)), "the regular expression in the config must match exactly our modules"
