"""A base that classifies: the rows that wait, of whatever adapters, go through it together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_hf.core.errors import AdapterError
from lora_hf.inference.classify import format_prediction
from lora_hf.serving.requests import Classified, Classify
from lora_hf.serving.worker import Worker


class Classifier(Worker):
    """Batches of up to `max_batch` rows and `max_tokens` tokens, in the order in which they came."""

    kind = "sequence-classification"

    def _take(self) -> list[tuple[Classify, int]]:
        batch: list[tuple[Classify, int]] = []
        tokens = 0
        while self._waiting and len(batch) < self.limits.max_batch:
            request: Classify = self._waiting[0]
            tokens += len(request.inputs[request.taken]["input_ids"])
            if batch and tokens > self.limits.max_tokens:
                break
            batch.append((request, request.taken))
            request.taken += 1
            if not request.rows:
                self._waiting.popleft()
        return batch

    def _answer(self, batch: Sequence[tuple[Classify, int]]) -> int:
        # Rows of one adapter side by side, in the mixture's order, need not be moved together at each projection.
        batch = sorted(batch, key=lambda row: (row[0].slot is None, row[0].slot or ""))
        inputs = [request.inputs[place] for request, place in batch]
        with torch.inference_mode(), self._adapted([request.slot for request, _ in batch]):
            padded = self.tokenizer.pad(inputs, return_tensors="pt").to(self.model.device)
            logits = self.model(**padded).logits.float().cpu().numpy()
        for (request, place), row in zip(batch, logits, strict=True):
            request.logits[place] = row[: request.version.saved.task.num_labels]
            if len(request.logits) == len(request.inputs):
                _finish(request)
        return sum(len(row["input_ids"]) for row in inputs)


def _finish(request: Classify) -> None:
    version = request.version
    logits = [request.logits[place] for place in range(len(request.inputs))]
    if not all(np.isfinite(row).all() for row in logits):
        request.fail(AdapterError(f"{version.name} (version {version.digest}) gave a logit that is no finite number"))
        return
    answers = [format_prediction(version.saved.task, row) for row in logits]
    request.finish(Classified(version.name, version.digest, answers, logits))
