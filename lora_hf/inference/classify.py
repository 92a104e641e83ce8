"""Classifies rows with trained weights: logits, predictions and the metrics of a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from lora_hf.adapters.fit import check_tokenizer
from lora_hf.adapters.resolve import SavedModel
from lora_hf.adapters.save_load import load_adapter, load_saved_model
from lora_hf.core.errors import AdapterError
from lora_hf.data.tasks.base import TRUNCATED, Task
from lora_hf.lora.inject import adapter_state, check_adapter_exists
from lora_hf.lora.multi_adapter import mix_adapters
from lora_hf.lora.precision import flush_denormals
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.models.align import align_tokenizer, check_tokens, output_logits, padding_side, split_by_length
from lora_hf.models.load import dequantise
from lora_hf.models.tokenizer_identity import tokenizer_identity

Progress = Any  # a callable that wraps an iterable, such as tqdm


@dataclass
class Predictor:
    """A model ready for inference, and the task it was trained for. `max_length` is in tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_length: int = 512

    def __post_init__(self) -> None:
        align_tokenizer(self.tokenizer, self.model)
        self.max_length = min(self.max_length, self.tokenizer.model_max_length)

    @classmethod
    def load(cls, saved: SavedModel, precision: str | None = None, exact: bool = False) -> Predictor:
        """Loads an adapter on its base, or a full model, as `load_saved_model`; by default in the run's precision.

        With `exact` it runs in fp32, and a quantized base is dequantized.

        Raises:
            AdapterError, ModelError, HubError: as `load_saved_model`.
        """
        model, tokenizer = load_saved_model(saved, "fp32" if exact else precision or saved.model.precision)
        if exact:
            dequantise(model)
        enable_unpadding(model)
        return cls(model, tokenizer, saved.task, saved.max_length)

    def logits(self, rows: dict[str, list], batch_size: int = 64, progress: Progress = iter) -> np.ndarray:
        """The fp32 logits `(rows, num_labels)`, in the order of the rows. A batch holds rows of similar length.

        Raises:
            TrainingError: a logit is not finite.
        """
        return self.outputs(rows, batch_size, progress)

    def outputs(self, rows: Mapping[str, list], batch_size: int = 64, progress: Progress = iter) -> Any:
        """What the model says about each row, as `Task.row_outputs` returns it, in the order of the rows."""
        encoded = _encode(self.task, rows, self.tokenizer, self.model, self.max_length)
        inputs = model_inputs(encoded, self.tokenizer)
        outputs = batched_logits(self.model, self.tokenizer, inputs, batch_size, progress)
        return self.task.row_outputs(outputs, encoded, rows)

    def predict(
        self, rows: Mapping[str, list], batch_size: int = 64, progress: Progress = iter
    ) -> list[dict[str, Any]]:
        """The answer for each row, as `Task.format_answer`."""
        return [self.task.format_answer(output) for output in self.outputs(rows, batch_size, progress)]


@dataclass
class MultiAdapterPredictor:
    """Several adapters on one base. A batch may mix rows of different adapters."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saved: dict[str, SavedModel]

    @classmethod
    def load(cls, saved: Mapping[str, SavedModel], precision: str | None = None) -> MultiAdapterPredictor:
        """Loads the adapters, by name, on the base that all of them were trained on.

        Raises:
            AdapterError: different bases, a full model, or an adapter that generates text; and as `load_saved_model`.
            ModelError, HubError: as `load_saved_model`.
        """
        (first, base), *others = saved.items()
        for name, other in saved.items():
            if other.is_full_model or other.task.model_kind != "sequence-classification":
                raise AdapterError(f"{name}={other.folder}: expected an adapter for classification; run it alone")
        for name, other in others:
            # Neither the precision nor the dropout of a run makes another base.
            if replace(other.model, precision=base.model.precision, dropout=base.model.dropout) != base.model:
                raise AdapterError(
                    f"{first}={base.folder} was trained on {base.model.name}, {name}={other.folder} on "
                    f"{other.model.name}: adapters of one batch need one base, with the same settings in model"
                )
        model, tokenizer = load_saved_model(base, precision or base.model.precision, adapted=False)
        identity = tokenizer_identity(tokenizer)
        for name, each in saved.items():
            load_adapter(model, each.folder, name, own_head=True)
            check_tokenizer(each.folder, identity)
        model.eval()
        enable_unpadding(model)
        return cls(model, tokenizer, dict(saved))

    def logits(
        self, rows: Sequence[tuple[str, Mapping[str, str]]], batch_size: int = 64, progress: Progress = iter
    ) -> list[np.ndarray]:
        """The fp32 logits `(num_labels,)` of each row. A row is the name of an adapter and the columns of its task.

        Raises:
            AdapterError: an adapter that is not loaded.
            TrainingError: a logit is not finite.
        """
        names = [name for name, _ in rows]
        inputs: list[dict[str, list[int]]] = [{} for _ in rows]
        for name in dict.fromkeys(names):
            check_adapter_exists(adapter_state(self.model), name)
            saved, indices = self.saved[name], [index for index, other in enumerate(names) if other == name]
            columns = {key: [rows[index][1][key] for index in indices] for key in saved.task.text_columns}
            max_length = min(saved.max_length, self.tokenizer.model_max_length)
            encoded = _encode(saved.task, columns, self.tokenizer, self.model, max_length)
            for index, row in zip(indices, model_inputs(encoded, self.tokenizer), strict=True):
                inputs[index] = row
        logits = batched_logits(self.model, self.tokenizer, inputs, batch_size, progress, names)
        logits = [row[: self.saved[name].task.num_labels] for name, row in zip(names, logits, strict=True)]
        for name in dict.fromkeys(names):
            of_adapter = [row for row, other in zip(logits, names, strict=True) if other == name]
            self.saved[name].task.check_finite(np.stack(of_adapter), f"logits of {name}")
        return logits

    def predict(
        self, rows: Sequence[tuple[str, Mapping[str, str]]], batch_size: int = 64, progress: Progress = iter
    ) -> list[dict[str, Any]]:
        """The answer for each row, as `Task.format_answer`."""
        logits = self.logits(rows, batch_size, progress)
        return [self.saved[name].task.format_answer(row) for (name, _), row in zip(rows, logits, strict=True)]


def _encode(
    task: Task, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> dict[str, list]:
    """What the task encodes of the rows, without padding; warns about truncated rows."""
    encoded = task.encode(rows, tokenizer, max_length)
    task.warn_truncated(encoded[TRUNCATED], tokenizer, max_length)
    task.warn_honored_tokens(rows, tokenizer)
    check_tokens(task, encoded["input_ids"], tokenizer, model)
    return encoded


def model_inputs(encoded: Mapping[str, list], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """The model's inputs of each entry, without labels and what else a task encodes."""
    inputs = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    return [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]


def pad_rows(
    rows: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> BatchEncoding:
    """The rows as a batch `(rows, seq)` on the model's device."""
    return tokenizer.pad(list(rows), padding_side=padding_side(model), return_tensors="pt").to(model.device)


@flush_denormals()
def batched_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[dict[str, list[int]]],
    batch_size: int,
    progress: Progress,
    adapters: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """The logits of each row, in the order of `inputs`. A batch holds rows of similar length.

    Logits of tokens are padded on the right.

    Args:
        adapters: the adapter of each row; by default the active one.
    """
    order: list[int] = np.argsort([-len(row["input_ids"]) for row in inputs], kind="stable").tolist()
    results: list[Any] = [None] * len(order)
    stacks: dict[Any, Any] = {}
    with torch.inference_mode():
        for start in progress(range(0, len(order), batch_size)):
            chunk = order[start : start + batch_size]
            for indices in split_by_length(model, chunk, [len(inputs[index]["input_ids"]) for index in chunk]):
                batch = pad_rows([inputs[index] for index in indices], tokenizer, model)
                with mix_adapters(model, [adapters[index] for index in indices], stacks) if adapters else nullcontext():
                    logits = output_logits(model(**batch))
                for index, row in zip(indices, logits.float().cpu().numpy(), strict=True):
                    results[index] = row
    return results


def evaluate(
    predictor: Predictor, splits: Mapping[str, Dataset], progress: Progress = iter
) -> dict[str, tuple[dict[str, float], dict[str, Any]]]:
    """By split the metrics of the task and its `evaluation`: scores by class, confusions, calibration, mistakes.

    Raises:
        DataError: the labels of a split are hidden.
    """
    task, found = predictor.task, {}
    for split, rows in splits.items():
        columns = {column: list(rows[column]) for column in rows.column_names}
        outputs = predictor.outputs(columns, progress=progress)
        found[split] = task.score_rows(outputs, rows), task.evaluation(outputs, rows)
    return found
