"""Logits and every gradient equal PEFT's with the same weights, for each model type of the role table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.inject import inject, lora_layers
from lora_hf.lora.slices import diagonal_blocks
from tests.support.model_classes import has_class, outputs_of
from tests.support.small_models import randomize_lora_b, small_config
from tests.tolerances import PARITY_FP32

CLASSES = ("AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
QUICK = ("bert", "deberta-v2", "gpt2", "llama", "mixtral", "modernbert", "roberta", "t5")


def plain_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    auto = next(auto for auto in CLASSES if has_class(kind, auto))
    return getattr(transformers, auto).from_config(small_config(kind)).eval()


def backward(model: Any) -> torch.Tensor:
    outputs = outputs_of(model)
    (outputs * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    return outputs.detach()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.full) for kind in sorted(ARCHITECTURES)]
)
def test_logits_and_every_gradient_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    base = plain_model(kind)
    ours: Any = inject(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, targets=("all",)))  # type: ignore[arg-type]
    randomize_lora_b(ours, std=0.1)
    save_adapter(ours, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)  # type: ignore[arg-type]
    found, expected = backward(ours), backward(theirs.get_base_model().eval())
    assert torch.allclose(found, expected, rtol=0, atol=PARITY_FP32 * max(1, float(expected.abs().max())))
    for path, layer in lora_layers(ours).items():
        weights, other = layer.adapters["default"], theirs.base_model.model.get_submodule(path)
        grad_b = other.lora_B["default"].weight.grad
        pairs = {
            "A": (weights.lora_A.grad, other.lora_A["default"].weight.grad),
            "B": (weights.lora_B.grad, torch.cat(diagonal_blocks(grad_b, weights.slices))),
        }
        for name, (own, reference) in pairs.items():
            assert own.any(), f"{path} {name} learns nothing"
            scale = max(1.0, float(reference.abs().max()))
            assert torch.allclose(own, reference, rtol=0, atol=PARITY_FP32 * scale), f"{path} {name}"
