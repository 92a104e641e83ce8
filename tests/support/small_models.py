"""Small models of every architecture in `lora.architectures`: classes of transformers with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as auto

from lora_hf.lora.inject import lora_layers

_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_LLAMA = _BERT | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "bos_token_id": 0, "eos_token_id": 0}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MOE = _LLAMA | _EXPERTS
_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8}

# The types of the role table.
SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "ernie", "mpnet"), _BERT),
    "electra": {**_BERT, "embedding_size": 16},
    "albert": {**_BERT, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {**_BERT, **_SLIDING, "local_attention": 4, "cls_token_id": 2, "sep_token_id": 3},
    "deberta": {**_BERT, **_RELATIVE},
    "deberta-v2": {**_BERT, **_RELATIVE},
    "gpt2": _GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 48,
        "window_size": 4,
        "attention_types": [[["global", "local"], 1]],
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": _BERT | {"bos_token_id": 0, "eos_token_id": 0},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**_BERT, "multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 2},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    **dict.fromkeys(("llama", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "cohere"), _LLAMA),
    "mistral": {**_LLAMA, "sliding_window": None},
    "gemma": {**_LLAMA, **_GEMMA},
    "gemma2": {**_LLAMA, **_GEMMA, **_SLIDING},
    "gemma3_text": {**_LLAMA, **_GEMMA, **_SLIDING},
    "phi": _LLAMA,
    "phi3": _LLAMA | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "starcoder2": {**_LLAMA, "bos_token_id": 0, "eos_token_id": 0},
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MOE),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian"), _BART),
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
}
# Types that the role table does not have.
UNKNOWN_SHAPES: dict[str, dict[str, Any]] = {
    "roformer": {**_BERT, "embedding_size": 32},
    "megatron-bert": _BERT,
    "rembert": {**_BERT, "input_embedding_size": 16, "output_embedding_size": 32},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "gpt_bigcode": _GPT2,
    "stablelm": _LLAMA,
    "codegen": {**_GPT2, "rotary_dim": 4, "n_head": 4},
    "led": _BART
    | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
}


# Types with a classifier that reads any sequence; those of encoder-decoder models want an end token in each row.
CLASSIFIERS = tuple(
    kind
    for kind in SHAPES
    if kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    and SHAPES[kind] not in (_BART, _T5)
    and kind != "mt5"
)


def small_model(kind: str, num_labels: int | None = None, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A model of `kind` in eval mode: a classifier with `num_labels`, otherwise a causal LM."""
    torch.manual_seed(seed)
    if num_labels is None:
        return AutoModelForCausalLM.from_config(small_config(kind, **more)).eval()
    return AutoModelForSequenceClassification.from_config(small_config(kind, num_labels=num_labels, **more)).eval()


def small_config(kind: str, **more: Any) -> PretrainedConfig:
    """The config of a small model of a type in SHAPES or UNKNOWN_SHAPES."""
    return AutoConfig.for_model(
        kind, **{"vocab_size": 100, "pad_token_id": 1, **(SHAPES | UNKNOWN_SHAPES)[kind], **more}
    )


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
