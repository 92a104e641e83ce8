"""The worker of a classification base: waiting rows of any adapters share a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_hf.core.errors import AdapterError
from lora_hf.inference.classify import output_logits, pad_rows
from lora_hf.serving.requests import ClassifyRequest, ClassifyResult
from lora_hf.serving.worker import Worker


class ClassifyWorker(Worker):
    """Takes up to `max_batch` rows and `max_tokens` tokens per batch, first come, first served."""

    verb = "predict"

    def _next_batch(self) -> list[tuple[ClassifyRequest, int]]:
        batch: list[tuple[ClassifyRequest, int]] = []
        tokens = 0
        while self._queue and len(batch) < self.limits.max_batch:
            request: ClassifyRequest = self._queue[0]
            tokens += len(request.inputs[request.taken]["input_ids"])
            if batch and tokens > self.limits.max_tokens:
                break
            batch.append((request, request.taken))
            request.taken += 1
            if not request.waiting_rows:
                self._queue.popleft()
        return batch

    def _run_batch(self, batch: Sequence[tuple[ClassifyRequest, int]]) -> int:
        # With the rows of one adapter side by side, in the order of the mixture, no projection has to reorder them.
        batch = sorted(batch, key=lambda row: (row[0].slot is None, row[0].slot or ""))
        inputs = [request.inputs[index] for request, index in batch]
        with torch.inference_mode(), self._adapters_of_rows([request.slot for request, _ in batch]):
            output = self.model(**pad_rows(inputs, self.tokenizer, self.model))
            logits = output_logits(output).float().cpu().numpy()
        for (request, index), row in zip(batch, logits, strict=True):
            request.logits[index] = row[..., : request.version.saved.task.num_labels]
            if len(request.logits) == len(request.inputs):
                _finish(request)
        return sum(len(row["input_ids"]) for row in inputs)


def _finish(request: ClassifyRequest) -> None:
    version = request.version
    logits = [request.logits[index] for index in range(len(request.inputs))]
    if not all(np.isfinite(row).all() for row in logits):
        request.fail(AdapterError(f"{version.name} (version {version.digest}): returned logits that are not finite"))
        return
    task = version.saved.task
    outputs = list(task.row_outputs(logits, request.encoded, request.rows))
    answers = [task.format_answer(output) for output in outputs]
    request.finish(ClassifyResult(version.name, version.digest, answers, outputs, request.truncated))
