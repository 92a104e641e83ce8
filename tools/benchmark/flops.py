"""How much a step must multiply, and how fast this machine multiplies: the two sides of `share_of_peak`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.lora.target_modules import plan, projections

SHAPES = ((768, 768), (768, 3072))  # (in, out): the projections of roberta-base and gpt2


@dataclass(frozen=True)
class Weights:
    """Numbers of matrix weights by how often a value passes through them; embeddings and vectors are left out."""

    token: int  # the projections of every layer
    row: int  # a classification head, a pooler
    label: int  # the language model's head


def matrix_weights(model: PreTrainedModel) -> Weights:
    """Counts the weights of a plain base model, before any adapter."""
    layers: dict[str, Any] = projections(model)
    inner = {site.path for site in plan(model, LoraConfig(targets=("all",)))}
    output = model.get_output_embeddings()
    sizes = {"token": 0, "row": 0, "label": 0}
    for path, layer in layers.items():
        sizes["token" if path in inner else "label" if layer is output else "row"] += layer.weight.numel()
    return Weights(**sizes)


def step_flops(weights: Weights, rows: Sequence[Mapping[str, Any]], per_weight: int) -> int:
    """The multiplications and additions that training on `rows` cannot do without.

    `per_weight * (token * T + row * R + label * L)` for T real tokens (no padding), R rows and L tokens with a label,
    the rows counted one by one. `per_weight` is 2 for the forward pass, 2 more for the gradient of the input and 2
    more for the gradient of the weight: 4 with a frozen base, 6 for full fine-tuning (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1, whose 2N and 4N are these). Attention's own products and the adapter's A and B (1 to 3 %
    of a step each) are not counted, so that a share of the peak is never flattered by them.
    """
    tokens = sum(sum(row["attention_mask"]) for row in rows)
    value = weights.token * tokens + weights.row * len(rows)
    if weights.label:
        # The first token of a row is predicted by nothing.
        value += weights.label * sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    return per_weight * value


def matmul_peak(device: torch.device, seconds: float) -> dict[str, float]:
    """The best bf16 rate of each shape, in FLOP/s, `rows x in -> out` by its name; `seconds` are spent on each."""
    counts = (1024, 4096, 16384) if device.type == "cuda" else (1024, 4096)
    found = {}
    for in_features, out_features in SHAPES:
        for rows in counts:
            x = torch.randn(rows, in_features, device=device, dtype=torch.bfloat16)
            weight = torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16)
            found[f"{rows}x{in_features}->{out_features}"] = 2 * weight.numel() * rows / _fastest(x, weight, seconds)
    return found


@torch.no_grad()
def _fastest(x: torch.Tensor, weight: torch.Tensor, seconds: float) -> float:
    # On a GPU one product is shorter than the wait for it: several go between two waits.
    block = 20 if x.is_cuda else 1
    best, begin = float("inf"), time.perf_counter()
    for number in range(10**6):
        synchronize(x.device)
        start = time.perf_counter()
        for _ in range(block):
            linear(x, weight)
        synchronize(x.device)
        end = time.perf_counter()
        if number:  # the first prepares the kernel
            best = min(best, (end - start) / block)
            if end - begin > seconds:
                break
    return best


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
