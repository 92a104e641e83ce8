"""Small models of every architecture in `lora.architectures`: classes of transformers with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from lora_hf.lora.inject import lora_layers

SHAPES: dict[str, dict[str, Any]] = {
    "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "deberta-v2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
}


def small_model(kind: str, num_labels: int | None = None, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A model of `kind` in eval mode: a classifier with `num_labels`, otherwise a causal LM."""
    torch.manual_seed(seed)
    values = {"vocab_size": 100, "pad_token_id": 1, **SHAPES[kind], **more}
    if num_labels is None:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()
    config = AutoConfig.for_model(kind, num_labels=num_labels, **values)
    return AutoModelForSequenceClassification.from_config(config).eval()


def token_ids(rows: int = 3, length: int = 7) -> torch.Tensor:
    """Token ids `(rows, length)` without special tokens."""
    return torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(1))


def randomize_lora_b(model: PreTrainedModel, seed: int = 7, std: float = 0.5) -> None:
    """Gives every LoRA B random values. With B = 0 an adapter changes nothing, and a test would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for weights in layer.adapters.values():
            values = torch.randn(weights.lora_B.shape, generator=generator) * std
            weights.lora_B.data.copy_(values)
