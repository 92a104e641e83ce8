"""What the trainer changes in a model before it trains it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.inject import inject
from lora_hf.training.trainer import enable_optimizations
from tests.support.small_models import small_config, token_ids

ENCODER_DECODERS = ("bart", "led", "marian", "mbart", "mt5", "pegasus", "t5")


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_an_encoder_decoder_in_16_bits_is_summed_in_fp32(kind: str, dtype: torch.dtype) -> None:
    """In its own precision the sum over 1024 tokens is rounded to three digits in bf16, and overflows in fp16."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(small_config(kind), dtype=dtype).eval()
    head = model.get_output_embeddings()
    head.weight.data.mul_(1000)  # logits, and so losses, of a size that fp16 cannot sum
    inject(model, LoraConfig(targets=("attention",), r=2))
    for _ in range(2):
        enable_optimizations(model)
    ids = token_ids(32, 32)
    output = model(input_ids=ids, labels=ids)
    exact = cross_entropy(output.logits.float().flatten(0, 1), ids.flatten())
    assert exact.item() > 10
    torch.testing.assert_close(output.loss, exact)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
