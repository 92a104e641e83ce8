"""What a trained run answers: scores over a split, and predictions for texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.loading import load_saved
from lora_hf.padding_free import remove_padding
from lora_hf.saved import Saved
from lora_hf.tasks.base import Task

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
    def load(cls, saved: Saved, precision: str | None = None) -> Predictor:
        """Loads the adapter on its base, or the whole model; `precision` as `load_saved`, without it that of the run.

        Raises:
            AdapterError, ModelError, HubError: as `load_saved`.
        """
        model, tokenizer = load_saved(saved, precision or saved.model.precision)
        remove_padding(model)
        return cls(model, tokenizer, saved.task, min(saved.max_length, tokenizer.model_max_length))

    def logits(self, rows: dict[str, list], batch_size: int = 64, progress: Progress = iter) -> np.ndarray:
        """`(rows, num_labels)` logits in fp32, in the order of the rows; batches are made of rows of like length."""
        encoded = self.task.encode(rows, self.tokenizer, self.max_length)
        encoded.pop("labels", None)
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
        answers: list[np.ndarray | None] = [None] * len(order)
        with torch.inference_mode():
            for start in progress(range(0, len(order), batch_size)):
                chosen = order[start : start + batch_size]
                batch = {key: [values[index] for index in chosen] for key, values in encoded.items()}
                inputs = self.tokenizer.pad(batch, return_tensors="pt").to(self.model.device)
                for index, row in zip(chosen, self.model(**inputs).logits.float().cpu().numpy(), strict=True):
                    answers[index] = row
        return np.stack(answers)  # type: ignore[arg-type]

    def predict(self, rows: dict[str, list], batch_size: int = 64, progress: Progress = iter) -> list[dict[str, Any]]:
        """For each row its label and the probability of each label; for a regression its score."""
        logits = self.logits(rows, batch_size, progress)
        if self.task.problem_type == "regression":
            return [{"score": round(float(row[0]), 4)} for row in logits]
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        names = self.task.label_names
        return [
            {
                "label": names[int(row.argmax())],
                "probabilities": {name: round(float(p), 4) for name, p in zip(names, row, strict=True)},
            }
            for row in shifted / shifted.sum(axis=1, keepdims=True)
        ]


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
