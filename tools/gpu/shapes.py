"""The bases of the GPU check, and batches at the lengths of real rows."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.lora.heads import mark_head_as_new
from lora_hf.models.load import set_dropout

Row = dict[str, list[int]]

_BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    },
    "roberta-base": {**_BERT, "model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514},
    "modernbert-base": {"model_type": "modernbert"},  # the defaults are its shape
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "llama-1b": {
        **_LLAMA,
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA,
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
    },
}
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
ENCODERS = ("minilm", "roberta-base", "modernbert-base")

# Tokens at 48 evenly spaced quantiles of 4,000 training rows, by MiniLM's tokenizer and SmolLM2's; for E2E those of the
# input and of the reference. A chat row is an E2E row in SmolLM2's template, which adds 30 tokens.
# fmt: off
SST2 = (3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 14, 15, 16,
        17, 17, 18, 19, 20, 21, 23, 24, 25, 27, 30, 32, 36, 45)
MNLI = (12, 14, 16, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 29, 31, 31, 32, 33, 34, 35, 36, 37, 38, 38, 39, 40,
        41, 42, 43, 44, 45, 46, 48, 49, 51, 52, 54, 55, 57, 59, 62, 65, 69, 75, 82, 100)
E2E = ((14, 14), (19, 14), (22, 14), (24, 14), (20, 19), (24, 17), (23, 19), (26, 17), (27, 17), (27, 18), (27, 19),
       (24, 23), (27, 20), (25, 23), (28, 21), (27, 23), (24, 27), (28, 23), (31, 21), (37, 16), (28, 26), (27, 28),
       (28, 27), (27, 29), (34, 23), (34, 24), (32, 27), (27, 33), (37, 24), (38, 24), (33, 30), (34, 30), (35, 30),
       (38, 28), (42, 25), (36, 32), (38, 31), (44, 26), (37, 34), (33, 40), (48, 26), (48, 27), (37, 40), (39, 40),
       (49, 32), (43, 41), (44, 43), (48, 44))
# fmt: on
CHAT_TEMPLATE = 30
LOWEST_ID, HIGHEST_ID = 10, 250  # no special token of any base, and within each vocabulary


@dataclass
class Check:
    """What the parts share.

    Attributes:
        models: a folder with `minilm` and `smollm2`, or None.
        rehearses: whether all shapes are tiny.
        deadline: when the current part has to end, on the monotonic clock.
        weights: by the name of a base where its weights come from.
    """

    device: torch.device
    models: Path | None
    rehearses: bool
    deadline: float
    weights: dict[str, str]

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def config(self, name: str) -> PretrainedConfig:
        shape = dict(SHAPES[name])
        kind = shape.pop("model_type")
        if self.rehearses:
            shape |= {"vocab_size": 256} | (TINY_GPT2 if kind == "gpt2" else TINY)
            shape |= {"num_key_value_heads": 2, "head_dim": 8} if kind == "llama" else {}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        config = AutoConfig.for_model(kind, **shape, **special)
        set_dropout(config, 0.0)  # the libraries draw their dropout differently, and losses are compared
        return config

    def build(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        """A base with the same weights each time: those of a folder, else random ones of its shape."""
        auto: Any = AutoModelForSequenceClassification if name in ENCODERS else AutoModelForCausalLM
        folder = self.models / name if self.models is not None else None
        torch.manual_seed(0)
        if folder is not None and folder.is_dir():
            self.weights[name] = "pretrained"
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            set_dropout(config, 0.0)
            return auto.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True).to(self.device)
        self.weights[name] = "random"
        small = name in ("minilm", "smollm2")  # of which a side in fp32 has the same weights
        with self.device:
            model = auto.from_config(self.config(name), dtype=torch.float32 if small else dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        mark_head_as_new(model)
        return model


def sst2_rows(count: int) -> list[Row]:
    return _labeled(SST2, count)


def mnli_rows(count: int) -> list[Row]:
    return _labeled(MNLI, count)


def e2e_rows(count: int, template: int = 0) -> list[Row]:
    """Rows of a causal model, whose labels are those of the reference."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        prompt, reference = draw.choice(E2E)
        prompt += template
        ids = _ids(draw, prompt + reference)
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE_INDEX] * prompt + ids[prompt:]}
        )
    return rows


def chat_rows(count: int) -> list[Row]:
    return e2e_rows(count, CHAT_TEMPLATE)


def _labeled(lengths: Sequence[int], count: int) -> list[Row]:
    """Rows whose label can be learned: it is whether the second token is one of the lower half of all ids."""
    draw = random.Random(0)
    rows: list[Any] = []
    for _ in range(count):
        ids = _ids(draw, draw.choice(lengths))
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(ids[1] < HIGHEST_ID // 2)})
    return rows


def _ids(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(length)]


def batches_of(rows: Sequence[Any], size: int, grouped: bool = False) -> list[list[Any]]:
    """Full batches in the order of the rows, or with rows of similar length together."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"])) if grouped else list(rows)
    batches = [ordered[start : start + size] for start in range(0, len(ordered) - size + 1, size)]
    if grouped:
        random.Random(0).shuffle(batches)
    return batches


def padded(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A batch on the host, padded to its longest row."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filling: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filling] * (longest - len(row[name])) for row in rows])

    batch = {"input_ids": column("input_ids", 0), "attention_mask": column("attention_mask", 0)}
    has_class = isinstance(rows[0]["labels"], int)
    batch["labels"] = torch.tensor([row["labels"] for row in rows]) if has_class else column("labels", IGNORE_INDEX)
    return batch
