"""The losses and gradients of a batch whose rows belong to several runs, each with an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lora_hf.core.errors import TrainingError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.tasks.base import Task
from lora_hf.lora.multi_adapter import mix_adapters
from lora_hf.models.align import padding_side

CPU_TOKENS = 2048  # of a pass: more do not speed up its matrix products, and leave the cache between two operations


@dataclass(frozen=True)
class RunBatch:
    """The next rows of one run.

    Attributes:
        inputs: of the model, with their labels; `(rows, seq)`.
        items: the number of labeled tokens in all batches of the optimizer step; None for a classifier.
        accumulated: the number of these batches.
    """

    adapter: str
    task: Task
    inputs: dict[str, Tensor]
    items: Tensor | int | None = None
    accumulated: int = 1


def add_gradients(model: PreTrainedModel, batches: Sequence[RunBatch]) -> list[Tensor]:
    """Adds each run's gradients to those of its adapter, and returns its loss.

    All runs share a forward and a backward pass, or on a CPU as many as they fill with CPU_TOKENS each.
    """
    model.train()
    found = []
    for group in _groups(batches) if model.device.type == "cpu" else [batches]:
        total, losses = _losses(model, group)
        total.backward()
        found += [loss.detach() for loss in losses]
    return found


def _groups(batches: Sequence[RunBatch]) -> list[list[RunBatch]]:
    """The batches in order, as many in each group as have CPU_TOKENS tokens together."""
    groups: list[list[RunBatch]] = [[]]
    tokens = 0
    for batch in batches:
        count = int(batch.inputs["attention_mask"].sum())
        if tokens and tokens + count > CPU_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(batch)
        tokens += count
    return groups


def _losses(model: Any, batches: Sequence[RunBatch]) -> tuple[Tensor, list[Tensor]]:
    """The sum of the losses, to differentiate, and the loss of each run."""
    generates = batches[0].task.model_kind == "causal-lm"
    padding = {"input_ids": model.config.pad_token_id, "labels": IGNORE_INDEX}
    side = padding_side(model)
    inputs = {
        key: pad_sequence([row for batch in batches for row in batch.inputs[key]], True, padding.get(key, 0), side)
        for key in batches[0].inputs
        if generates or key != "labels"
    }
    counts = [len(batch.inputs["input_ids"]) for batch in batches]
    adapters = [batch.adapter for batch, count in zip(batches, counts, strict=True) for _ in range(count)]
    if generates:
        items = torch.stack([torch.as_tensor(batch.items).float() for batch in batches])
        inputs["num_items_in_batch"] = items.repeat_interleave(torch.tensor(counts, device=items.device))
    with mix_adapters(model, adapters):
        output = model(**inputs)
    if not generates:
        parts = zip(batches, output.logits.split(counts), strict=True)
        losses = [_classifier_loss(batch, logits) / batch.accumulated for batch, logits in parts]
        return torch.stack(losses).sum(), losses
    if "rows" not in output:
        raise TrainingError(f"{model.config.model_type} has no loss by row; train these runs one by one")
    sums = torch.stack([rows[:, 0].sum() for rows in output.rows.split(counts)])
    return output.loss, list(sums / items)


def _classifier_loss(batch: RunBatch, logits: Tensor) -> Tensor:
    logits = logits[:, : batch.task.num_labels]  # other adapters may have more
    if batch.task.problem_type == "regression":
        return mse_loss(logits[:, 0], batch.inputs["labels"])
    return cross_entropy(logits, batch.inputs["labels"])
