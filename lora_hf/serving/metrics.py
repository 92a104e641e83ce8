"""The server's Prometheus metrics, in their own registry."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_hf.models.model_ids import base_name
from lora_hf.serving.requests import Observer

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Observer):
    """Counts requests and batches. No label ever holds a string that a client chose."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("lora_hf_requests", "HTTP requests", ["route", "status"], registry=registry)
        self._request_seconds = Histogram(
            "lora_hf_request_seconds", "Time to answer a request", ["route"], buckets=SECONDS, registry=registry
        )
        self._batch_rows = Histogram("lora_hf_batch_rows", "Rows per batch", ["base"], buckets=ROWS, registry=registry)
        self._batch_seconds = Histogram(
            "lora_hf_batch_seconds", "Time per batch", ["base"], buckets=SECONDS, registry=registry
        )
        self._rows = Counter("lora_hf_rows", "Rows answered", ["adapter"], registry=registry)
        self._tokens = Counter("lora_hf_tokens", "Tokens read and generated", ["base"], registry=registry)
        self._queue = Gauge("lora_hf_queue_rows", "Rows waiting", ["base"], registry=registry)
        self._adapters = Gauge("lora_hf_adapters", "Adapters served", registry=registry)

    def on_batch(self, base: str, rows: Sequence[str], answered: Sequence[str], tokens: int, seconds: float) -> None:
        base = base_name(base)
        self._batch_rows.labels(base).observe(len(rows))
        self._batch_seconds.labels(base).observe(seconds)
        self._tokens.labels(base).inc(tokens)
        for adapter, count in Count(answered).items():
            self._rows.labels(adapter).inc(count)

    def on_response(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def page(self, waiting: Mapping[str, int], adapters: int) -> bytes:
        """All metrics in Prometheus' text format, with the waiting rows by base and the number of adapters."""
        self._queue.clear()
        for base, rows in waiting.items():
            self._queue.labels(base_name(base)).inc(rows)
        self._adapters.set(adapters)
        return generate_latest(self.registry)
