"""The worker of a classification base: waiting rows of any adapters share a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lora_hf.core.errors import AdapterError
from lora_hf.inference.classify import pad_rows
from lora_hf.models.align import output_logits, split_by_length
from lora_hf.serving.requests import ClassifyResult, EmbedRequest, EmbedResult, RowsRequest
from lora_hf.serving.worker import Worker

logger = logging.getLogger(__name__)

# Clients that were just answered ask again while the next batch forms, so the thread waits until as many requests are
# queued as were lately: for at most this share of the last batch's time and at most this many seconds.
BATCH_WAIT_SHARE, MAX_BATCH_WAIT = 0.5, 0.05

Batch = list[tuple[RowsRequest, int]]  # each row of the batch as a request and the index of the row in it


class ClassifyWorker(Worker):
    """Takes up to `max_batch` rows and `max_tokens` tokens per batch, first come, first served."""

    _recent_requests = 0.0  # a decaying maximum of the queue's length
    _batch_seconds = 0.0  # of the last batch

    def _step(self) -> None:
        batch = self._collect_batch()
        if batch:
            start = time.perf_counter()
            self._run_isolating_failures(batch)
            names = [request.version.name for request, _ in batch]
            tokens = sum(len(request.inputs[index]["input_ids"]) for request, index in batch)
            self._record(names, names, tokens, start)
            self._batch_seconds = time.perf_counter() - start

    def _collect_batch(self) -> Batch:
        with self._changed:
            if 0 < len(self._queue) < int(self._recent_requests):
                self._wake_at = int(self._recent_requests)
                timeout = min(MAX_BATCH_WAIT, BATCH_WAIT_SHARE * self._batch_seconds)
                self._changed.wait_for(lambda: len(self._queue) >= self._wake_at or self._stopping, timeout)
                self._wake_at = 1
            self._recent_requests = max(float(len(self._queue)), 0.9 * self._recent_requests)
            self._drop_abandoned()
            batch = self._next_batch()
            self.waiting -= len(batch)
            return batch

    def _next_batch(self) -> Batch:
        batch: Batch = []
        tokens = 0
        while self._queue and len(batch) < self.limits.max_batch:
            request: RowsRequest = self._queue[0]
            tokens += len(request.inputs[request.taken]["input_ids"])
            if batch and tokens > self.limits.max_tokens:
                break
            batch.append((request, request.taken))
            request.taken += 1
            if not request.waiting_rows:
                self._queue.popleft()
        return batch

    def _run_isolating_failures(self, batch: Batch) -> None:
        """Runs a batch; if that fails, runs each of its requests alone, so that only the faulty one fails."""
        try:
            for embeds in (False, True):
                rows = [row for row in batch if isinstance(row[0], EmbedRequest) == embeds]
                lengths = [len(request.inputs[index]["input_ids"]) for request, index in rows]
                for part in split_by_length(self.model, rows, lengths) if rows else ():
                    self._run_batch(part, embeds)
        except Exception as error:  # the thread must survive, and the clients need an answer
            requests = list(dict.fromkeys(request for request, _ in batch))
            if len(requests) > 1:
                logger.warning("a batch of %d requests failed; retrying each alone: %r", len(requests), error)
                for request in requests:
                    self._run_isolating_failures([row for row in batch if row[0] is request])
                return
            logger.error("a request for %s failed", requests[0].version.name, exc_info=error)
            requests[0].fail(error)

    def _run_batch(self, batch: Batch, embeds: bool) -> None:
        # With the rows of one adapter side by side, in the order of the mixture, no projection has to reorder them.
        batch = sorted(batch, key=lambda row: (row[0].slot is None, row[0].slot or ""))
        outputs = self.model_thread.run(self._outputs, batch, embeds)
        for (request, index), row in zip(batch, outputs, strict=True):
            request.outputs[index] = row
            if len(request.outputs) == len(request.inputs):
                _finish(request, [request.outputs[number] for number in range(len(request.inputs))])

    def _outputs(self, batch: Batch, embeds: bool) -> np.ndarray:
        """The logits of each row, or the mean of its last hidden states."""
        inputs = pad_rows([request.inputs[index] for request, index in batch], self.tokenizer, self.model)
        with torch.inference_mode(), self._adapters_of_rows([request.slot for request, _ in batch]):
            if not embeds:
                return output_logits(self.model(**inputs)).float().cpu().numpy()
            hidden: Any = self.model.base_model(**inputs)[0].float()
            # Without a mask, as for FNet, the batch has no padding.
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            return _mean(hidden, mask).cpu().numpy()


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of each row, scaled to length 1, as sentence-transformers does by default."""
    weights = mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))


def _finish(request: RowsRequest, rows: Sequence[np.ndarray]) -> None:
    version, task = request.version, request.version.saved.task
    embeds = isinstance(request, EmbedRequest)
    rows = rows if embeds else [row[..., : task.num_labels] for row in rows]
    if not all(np.isfinite(row).all() for row in rows):
        what = "hidden states" if embeds else "logits"
        request.fail(AdapterError(f"{version.name} (version {version.digest}): returned {what} that are not finite"))
        return
    if embeds:
        tokens = sum(len(row["input_ids"]) for row in request.inputs)
        digest = None if request.bare else version.digest
        request.finish(EmbedResult(version.name, digest, [row.tolist() for row in rows], tokens))
        return
    outputs = list(task.row_outputs(rows, request.encoded, request.rows))
    answers = [task.format_answer(output) for output in outputs]
    request.finish(ClassifyResult(version.name, version.digest, answers, outputs, request.truncated))
