"""What a trained run answers: scores over a split, and predictions for texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.resolve import SavedModel
from lora_hf.adapters.save_load import load_adapter, load_saved_model
from lora_hf.core.errors import AdapterError
from lora_hf.data.tasks.base import Task
from lora_hf.lora.inject import adapter_state, check_adapter_exists
from lora_hf.lora.multi_adapter import mix_adapters
from lora_hf.lora.precision import flush_denormals
from lora_hf.lora.unpadding import enable_unpadding

Progress = Any  # a callable that wraps an iterable, such as tqdm
Scores = dict[str, dict[str, float]]  # by split, then by metric


@dataclass
class Predictor:
    """A model ready to answer, with the task it was trained for. `max_length` is in tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_length: int = 512

    @classmethod
    def load(cls, saved: SavedModel, precision: str | None = None) -> Predictor:
        """Loads the adapter on its base, or the whole model; `precision` as `load_saved_model`, without it that of the run.

        Raises:
            AdapterError, ModelError, HubError: as `load_saved_model`.
        """
        model, tokenizer = load_saved_model(saved, precision or saved.model.precision)
        enable_unpadding(model)
        return cls(model, tokenizer, saved.task, min(saved.max_length, tokenizer.model_max_length))

    def logits(self, rows: dict[str, list], batch_size: int = 64, progress: Progress = iter) -> np.ndarray:
        """`(rows, num_labels)` logits in fp32, in the order of the rows; batches are made of rows of like length."""
        inputs = _inputs(self.task, rows, self.tokenizer, self.max_length)
        return np.stack(batched_logits(self.model, self.tokenizer, inputs, batch_size, progress))

    def predict(self, rows: dict[str, list], batch_size: int = 64, progress: Progress = iter) -> list[dict[str, Any]]:
        """For each row its label and the probability of each label; for a regression its score."""
        return [format_prediction(self.task, row) for row in self.logits(rows, batch_size, progress)]


@dataclass
class MultiAdapterPredictor:
    """Several adapters on one base; rows of different adapters are answered in the same batches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saved: dict[str, SavedModel]

    @classmethod
    def load(cls, saved: Mapping[str, SavedModel], precision: str | None = None) -> MultiAdapterPredictor:
        """Loads the adapters, by their names, on the base that all of them were trained on.

        Raises:
            AdapterError: they have different bases, or one is a whole model or writes texts; and as `load_saved_model`.
            ModelError, HubError: as `load_saved_model`.
        """
        (first, base), *others = saved.items()
        for name, other in saved.items():
            if other.is_full_model or other.task.model_kind != "sequence-classification":
                raise AdapterError(f"{name}={other.folder}: expected an adapter that classifies; answer with it alone")
        for name, other in others:
            if replace(other.model, precision=base.model.precision) != base.model:
                raise AdapterError(
                    f"{first}={base.folder} was trained on {base.model.name}, {name}={other.folder} on "
                    f"{other.model.name}: adapters of one batch need one base"
                )
        model, tokenizer = load_saved_model(base, precision or base.model.precision, adapted=False)
        for name, each in saved.items():
            load_adapter(model, each.folder, name, own_head=True)
        model.eval()
        enable_unpadding(model)
        return cls(model, tokenizer, dict(saved))

    def logits(
        self, rows: Sequence[tuple[str, Mapping[str, str]]], batch_size: int = 64, progress: Progress = iter
    ) -> list[np.ndarray]:
        """`(num_labels,)` logits in fp32 of each row, which is the name of an adapter and its task's columns.

        Raises:
            AdapterError: an adapter that is not loaded.
        """
        names = [name for name, _ in rows]
        inputs: list[dict[str, list[int]]] = [{} for _ in rows]
        for name in dict.fromkeys(names):
            check_adapter_exists(adapter_state(self.model), name)
            each, chosen = self.saved[name], [place for place, other in enumerate(names) if other == name]
            columns = {key: [rows[place][1][key] for place in chosen] for key in each.task.text_columns}
            limit = min(each.max_length, self.tokenizer.model_max_length)
            for place, row in zip(chosen, _inputs(each.task, columns, self.tokenizer, limit), strict=True):
                inputs[place] = row
        answers = batched_logits(self.model, self.tokenizer, inputs, batch_size, progress, names)
        widths = [self.saved[name].task.num_labels for name in names]
        return [row[:width] for row, width in zip(answers, widths, strict=True)]

    def predict(
        self, rows: Sequence[tuple[str, Mapping[str, str]]], batch_size: int = 64, progress: Progress = iter
    ) -> list[dict[str, Any]]:
        """For each row its label and the probability of each label; for a regression its score."""
        logits = self.logits(rows, batch_size, progress)
        return [format_prediction(self.saved[name].task, row) for (name, _), row in zip(rows, logits, strict=True)]


def format_prediction(task: Task, logits: np.ndarray) -> dict[str, Any]:
    """What `(num_labels,)` logits say: the label and the probability of each; for a regression the score."""
    if task.problem_type == "regression":
        return {"score": round(float(logits[0]), 4)}
    shifted = np.exp(logits - logits.max())
    return {
        "label": task.label_names[int(logits.argmax())],
        "probabilities": {
            name: round(float(p), 4) for name, p in zip(task.label_names, shifted / shifted.sum(), strict=True)
        },
    }


def _inputs(
    task: Task, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[dict[str, list[int]]]:
    """The model's inputs of each row, unpadded."""
    encoded = task.encode(rows, tokenizer, limit)
    encoded.pop("labels", None)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


@flush_denormals()
def batched_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[dict[str, list[int]]],
    batch_size: int,
    progress: Progress,
    adapters: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """The logits of each row in order, from batches of rows of like length; with `adapters` each row's own."""
    order: list[int] = np.argsort([-len(row["input_ids"]) for row in inputs], kind="stable").tolist()
    answers: list[Any] = [None] * len(order)
    stacks: dict[Any, Any] = {}
    with torch.inference_mode():
        for start in progress(range(0, len(order), batch_size)):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad([inputs[row] for row in chosen], return_tensors="pt").to(model.device)
            with mix_adapters(model, [adapters[row] for row in chosen], stacks) if adapters else nullcontext():
                logits = model(**batch).logits
            for row, values in zip(chosen, logits.float().cpu().numpy(), strict=True):
                answers[row] = values
    return answers


def evaluate(
    predictor: Predictor, rows: Mapping[str, Dataset], progress: Progress = iter
) -> dict[str, dict[str, float]]:
    """The task's metrics by split.

    Raises:
        DataError: the labels of a split are hidden.
    """
    task = predictor.task
    scores = {}
    for split, part in rows.items():
        columns = {column: list(part[column]) for column in task.text_columns}
        scores[split] = task.score(predictor.logits(columns, progress=progress), np.asarray(part["label"]))
    return scores
