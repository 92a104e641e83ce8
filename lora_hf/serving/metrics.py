"""What a server tells Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lora_hf.models.model_ids import base_name
from lora_hf.serving.requests import Request
from lora_hf.serving.worker import Observer

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Observer):
    """Counts of requests and of the batches that answered them. No label holds what a client made up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("lora_hf_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "lora_hf_request_seconds",
            "From request to end of answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram("lora_hf_batch_rows", "Rows of a batch", ["base"], buckets=ROWS, registry=self.registry)
        self._work = Histogram(
            "lora_hf_batch_seconds", "Time of a batch", ["base"], buckets=SECONDS, registry=self.registry
        )
        self._rows = Counter("lora_hf_rows", "Rows answered", ["adapter"], registry=self.registry)
        self._tokens = Counter("lora_hf_tokens", "Tokens read and written", ["base"], registry=self.registry)

    def watch(self, waiting: Callable[[], dict[str, int]], adapters: Callable[[], int]) -> None:
        """Asks for the rows that wait, by base, and for the number of adapters, whenever it is asked itself."""
        self.registry.register(_Now(waiting, adapters))

    def ran(self, base: str, rows: Sequence[Request], tokens: int, seconds: float) -> None:
        base = base_name(base)
        self._batch.labels(base).observe(len(rows))
        self._work.labels(base).observe(seconds)
        self._tokens.labels(base).inc(tokens)
        for row in rows:
            self._rows.labels(row.version.name).inc()

    def answered(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request had its answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Now(Collector):
    def __init__(self, waiting: Callable[[], dict[str, int]], adapters: Callable[[], int]) -> None:
        self.waiting, self.adapters = waiting, adapters

    def collect(self) -> Iterator[GaugeMetricFamily]:
        queue = GaugeMetricFamily("lora_hf_queue_rows", "Rows that wait", labels=["base"])
        for base, rows in self.waiting().items():
            queue.add_metric([base_name(base)], rows)
        yield queue
        yield GaugeMetricFamily("lora_hf_adapters", "Adapters served", value=self.adapters())
