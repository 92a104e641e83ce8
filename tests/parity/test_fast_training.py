"""Fused training without padding gives the same losses as padded training with the reference formula."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel

from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.data.tasks.registry import get_task
from lora_hf.data.tokenization import encode
from lora_hf.lora import layers
from lora_hf.lora.inject import inject
from lora_hf.models.load import load_base, load_tokenizer
from lora_hf.training.trainer import enable_optimizations
from tests.support.cpu import has_bf16_units
from tests.tolerances import BF16_BATCH_LOSS_RTOL, BF16_LOSS_RTOL, FAST_TRAINING_FP32

pytestmark = pytest.mark.full

STEPS, ROWS = {"sst2": 20, "e2e_nlg": 8}, 8
WORK = {"sst2": "tiny-roberta", "e2e_nlg": "tiny-gpt2"}


def batches(name: str, data_dir: Path, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    task, tokenizer = get_task(name), load_tokenizer(ModelConfig(name=WORK[name]))
    rows = task.load(str(data_dir), ["train"])["train"].shuffle(seed=0).select(range(steps * ROWS))
    encoded = encode(task, rows, tokenizer, 256)
    collate = (DataCollatorForSeq2Seq if name == "e2e_nlg" else DataCollatorWithPadding)(tokenizer)
    for start in range(0, steps * ROWS, ROWS):
        yield dict(collate([encoded[row] for row in range(start, start + ROWS)]))


def losses(model: PreTrainedModel, data: Iterator[dict[str, torch.Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    found = []
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def adapted(name: str, precision: Any = "fp32") -> PreTrainedModel:
    model = load_base(ModelConfig(name=WORK[name], precision=precision), get_task(name))
    torch.manual_seed(0)
    return inject(model, LoraConfig(r=16, lora_alpha=16, targets=("all",))).train()


@pytest.mark.parametrize("name", WORK)
def test_every_loss_equals_that_of_the_reference(name: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = adapted(name)
    enable_optimizations(fast)
    ours = losses(fast, batches(name, data_dir, STEPS[name]))
    monkeypatch.setattr(layers, "can_fuse", lambda *_: False)
    plain = losses(adapted(name), batches(name, data_dir, STEPS[name]))
    difference = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    assert difference < FAST_TRAINING_FP32
    assert abs(plain[0] - plain[-1]) > 1000 * FAST_TRAINING_FP32, "the model must learn, or the comparison says little"


def test_losses_in_bf16_are_close_to_those_in_fp32(data_dir: Path) -> None:
    """The first three losses, and on a CPU with bf16 units also the mean of the last 20 of 50."""
    steps = 50 if has_bf16_units() else 3
    runs = {}
    for precision in ("fp32", "bf16"):
        model = adapted("e2e_nlg", precision)
        enable_optimizations(model)
        runs[precision] = losses(model, batches("e2e_nlg", data_dir, steps))
    for exact, rounded in zip(runs["fp32"][:3], runs["bf16"][:3], strict=True):
        assert abs(rounded - exact) < BF16_BATCH_LOSS_RTOL * exact
    if steps == 50:
        ends = {precision: sum(found[-20:]) / 20 for precision, found in runs.items()}
        assert runs["fp32"][0] > 1.2 * ends["fp32"], "the model must learn, or the comparison says little"
        assert abs(ends["bf16"] - ends["fp32"]) < BF16_LOSS_RTOL * ends["fp32"]
