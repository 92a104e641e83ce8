"""The FLOPs of a training step and the matmul peak of this machine, whose ratio is `share_of_peak`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.lora.layers import frozen_weight
from lora_hf.lora.target_modules import plan, projections
from lora_hf.models.load import DTYPES

SHAPES = ((768, 768), (768, 3072))  # (in, out): the projections of roberta-base and gpt2
HOPELESS = 0.5  # of the rate of the fastest precision


@dataclass(frozen=True)
class Weights:
    """Numbers of matrix weights, by how often each is used. Embeddings and vectors are left out."""

    token: int  # for every token: the projections of the layers
    row: int  # once per row: a classification head, a pooler
    label: int  # for every label: the language model head


def uses_of_weights(model: PreTrainedModel) -> dict[str, str]:
    """How often each matrix of a plain base is used, by its path: once for every `token`, `row` or `label`."""
    inner = {site.path for site in plan(model, LoraConfig(targets=("all",)))}
    output = model.get_output_embeddings()
    return {
        path: "token" if path in inner else "label" if layer is output else "row"
        for path, layer in projections(model).items()
    }


def matrix_weights(model: PreTrainedModel) -> Weights:
    """Counts the weights of a plain base model, before any adapter."""
    sizes = {"token": 0, "row": 0, "label": 0}
    for path, use in uses_of_weights(model).items():
        layer: Any = model.get_submodule(path)
        sizes[use] += layer.weight.numel()
    return Weights(**sizes)


def uses_in_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The numbers of real tokens (without padding), rows and labels."""
    return {
        "token": sum(sum(row["attention_mask"]) for row in rows),
        "row": len(rows),
        # Nothing predicts the first token of a row. The label of a classifier is a number.
        "label": sum(
            label != IGNORE_INDEX for row in rows if isinstance(row["labels"], list) for label in row["labels"][1:]
        ),
    }


def step_flops(weights: Weights, rows: Sequence[Mapping[str, Any]], per_weight: int) -> int:
    """The FLOPs that training on `rows` needs at least.

    This is `per_weight * (token * T + row * R + label * L)` for T real tokens (without padding), R rows and L labels.
    `per_weight` is 2 for the forward pass, 2 for the gradient of the input and 2 for the gradient of the weight: 4 with
    a frozen base, 6 for full fine-tuning (the 2N and 4N of Kaplan et al. 2020, arXiv 2001.08361, section 2.1). The
    products of attention and of the adapter's A and B (1 to 3 % of a step each) are not counted, so that they do not
    increase the share of the peak.
    """
    uses = uses_in_rows(rows)
    return per_weight * sum(getattr(weights, use) * count for use, count in uses.items())


class FrozenProducts:
    """The products of training steps with the weights of a frozen base, without padding, and nothing else.

    For each batch and matrix these are the product with the input and that with the gradient of the output.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], batch_size: int) -> None:
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        self.counts = [uses_in_rows(batch) for batch in batches]
        self.weights: list[tuple[str, Any]] = [
            (use, frozen_weight(model.get_submodule(path))) for path, use in uses_of_weights(model).items()
        ]
        largest = {use: max(count[use] for count in self.counts) for use in self.counts[0]}
        self.inputs = [weight.new_ones(largest[use], weight.shape[1]) for use, weight in self.weights]

    @torch.no_grad()
    def __call__(self) -> None:
        for count in self.counts:
            for (use, weight), x in zip(self.weights, self.inputs, strict=True):
                torch.mm(linear(x[: count[use]], weight), weight)


def matmul_peak(
    device: torch.device,
    seconds: float,
    precisions: Sequence[str] = ("fp32", "bf16"),
    counts: Sequence[int] | None = None,
) -> dict[str, float]:
    """The best rate in FLOP/s of each shape and precision, named like `1024x768->3072 bf16`. Each takes `seconds`.

    A precision that is much slower than another with few rows cannot be the peak, and is left out with more: a
    processor without bf16 units emulates bf16.

    Args:
        counts: the rows of the input, ascending; by default those that keep the device busy.
    """
    if counts is None:
        counts = (1024, 4096, 16384) if device.type == "cuda" else (1024, 4096)
    rates: dict[str, float] = {}
    fastest = dict.fromkeys(precisions, 0.0)
    for rows in counts:
        worthwhile = [name for name in precisions if fastest[name] >= HOPELESS * max(fastest.values())]
        for (in_features, out_features), name in product(SHAPES, worthwhile):
            x = torch.randn(rows, in_features, device=device, dtype=DTYPES[name])
            weight = torch.randn(out_features, in_features, device=device, dtype=DTYPES[name])
            rate = 2 * weight.numel() * rows / _fastest(x, weight, seconds)
            rates[f"{rows}x{in_features}->{out_features} {name}"] = rate
            fastest[name] = max(fastest[name], rate)
    return rates


@torch.no_grad()
def _fastest(x: torch.Tensor, weight: torch.Tensor, seconds: float) -> float:
    # On a GPU, one product takes less time than synchronizing, so several are timed together.
    block = 20 if x.is_cuda else 1
    best, begin = float("inf"), time.perf_counter()
    for number in range(10**6):
        synchronize(x.device)
        start = time.perf_counter()
        for _ in range(block):
            linear(x, weight)
        synchronize(x.device)
        end = time.perf_counter()
        if number:  # the first one prepares the kernel
            best = min(best, (end - start) / block)
            if end - begin > seconds:
                break
    return best


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
