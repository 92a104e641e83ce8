"""`serve`: the speed of a server under load. Adapters are replaced meanwhile, and every response is checked."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import MultiAdapterPredictor
from lora_hf.lora.inject import adapter_heads, inject, lora_layers
from lora_hf.models.load import load_base
from lora_hf.serving.requests import digest_of
from tools.benchmark.rounds import environment, with_resolved_precision
from tools.benchmark.server import TIMEOUT, Server, memory_without_models, running_server

logger = logging.getLogger(__name__)

STD = 0.05  # of every B and head, so that mixed-up adapters give visibly different results
# Allowed difference between served and offline probabilities, both rounded to four decimals. Batches sum in another
# order, which rounds differently in half precision.
TOLERANCES = {"fp32": 1.001e-4, "bf16": 2e-2, "fp16": 4e-3}


@dataclass
class Tally:
    """What the clients saw in one part of the benchmark. Latencies are in seconds."""

    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    memory: list[float] = field(default_factory=list)  # of the server, in MiB, once a second
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        for name in ("latencies", "errors", "wrong", "memory"):
            getattr(self, name).extend(getattr(other, name))
        self.versions |= other.versions
        self.seconds += other.seconds

    def summary(self) -> dict[str, Any]:
        """Throughput, latency quantiles, and the numbers of errors and wrong responses."""
        p50, p99 = np.quantile(self.latencies, [0.5, 0.99]) if self.latencies else (0.0, 0.0)
        return {
            "requests": len(self.latencies),
            "per_second": len(self.latencies) / self.seconds,
            "p50_ms": float(p50) * 1e3,
            "p99_ms": float(p99) * 1e3,
            "errors": len(self.errors),
            "wrong": len(self.wrong),
            "versions": len(self.versions),
            "examples": (self.errors + self.wrong)[:5],
        }


@dataclass
class Load:
    """The requests: any of `names` with any of `texts`. `expected` has the results of each version, one per text."""

    names: list[str]
    texts: list[str]
    expected: dict[str, list[dict[str, Any]]]
    tolerance: float


def benchmark_serve(
    config: RunConfig,
    clients: int = 16,
    adapters: int = 8,
    seconds: float = 20.0,
    replacements: int = 10,
    rows: int = 64,
) -> dict[str, Any]:
    """Measures a server with random adapters, and returns the record.

    First, one client sends one request at a time, then `clients` send requests at once, at first undisturbed. Then
    adapters are replaced `replacements` times in total, each by its other version. After that the single client goes
    on, because the speed of a machine may drift. At the end, the server is killed and started again.

    Args:
        rows: how many texts of the validation set the clients send.

    Raises:
        ConfigError: a number below one, or a task that does not classify single texts.
        TrainingError: the server did not start.
    """
    if min(clients, adapters, seconds, rows) < 1 or replacements < 0:
        found = f"--clients {clients} --adapters {adapters} --seconds {seconds:g} --rows {rows}"
        raise ConfigError(f"{found} --replacements {replacements}: expected at least 1 of each, and 0 replacements")
    task = get_task(config.task.name)
    if task.model_kind != "sequence-classification" or len(task.text_columns) != 1:
        raise ConfigError(f"benchmark serve: expected a task that classifies single texts, found {task.name}")
    config = with_resolved_precision(config)
    precision = config.model.precision
    split = task.evaluation_splits[0]
    texts = list(task.load(config.task.data_dir, [split])[split][task.text_columns[0]][:rows])
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = _save(config, root, adapters)
        load = Load(
            [f"adapter{number}" for number in range(adapters)],
            texts,
            _offline(folders, texts, task.text_columns[0], precision),
            TOLERANCES[precision],
        )
        served = {name: folders[2 * index] for index, name in enumerate(load.names)}
        token = secrets.token_hex(16)
        server = stack.enter_context(running_server(served, root, precision, token))
        logger.info("benchmark: one request at a time")
        one = _drive(server, load, 1, max(1.0, seconds / 8), lambda: None)
        logger.info("benchmark: %d clients", clients)
        undisturbed = _drive(server, load, clients, max(1.0, seconds / 4), lambda: None)
        memory = {
            "base_mib": _base_mib(config),
            "without_models_mib": memory_without_models(),
            "before_mib": _usual_memory(undisturbed),
        }
        replacer = _Replacer(server, load.names, [folder.name for folder in folders], replacements, seconds)
        metrics = server.metrics()
        many = _drive(server, load, clients, seconds, replacer)
        rows_of_a_batch = _mean_since(metrics, server.metrics(), "lora_hf_batch_rows")
        memory["after_mib"] = _usual_memory(many)
        logger.info("benchmark: one request at a time")
        one.add(_drive(server, load, 1, max(1.0, seconds / 8), lambda: None))
        server.process.kill()
        server.process.wait()
        restarted = stack.enter_context(running_server(served, root, precision, token))
        after = _drive(restarted, load, 1, 1.0, lambda: None)
        restarted.process.terminate()
        code = restarted.process.wait(60)
    alone, together, before = one.summary(), many.summary(), undisturbed.summary()
    return {
        "work": {
            "model": Path(config.model.name).name,
            "init": config.model.init,
            "task": task.name,
            "adapters": adapters,
            "clients": clients,
            "seconds": seconds,
            "texts": len(texts),
            "lora": config.to_dict()["lora"],
            "precision": precision,
            "tolerance": load.tolerance,
        },
        "one_at_a_time": alone,
        "together": together | {"rows_of_a_batch": rows_of_a_batch},
        "undisturbed": before,
        "ratio": together["per_second"] / alone["per_second"],
        "p99_over_p50": together["p99_ms"] / together["p50_ms"],
        "p99_over_undisturbed": together["p99_ms"] / before["p99_ms"],
        "memory": memory,
        "replaced": {"times": replacer.done, "failed": replacer.failed, "milliseconds": replacer.milliseconds},
        "started_in_seconds": server.startup_seconds,
        "started_again_in_seconds": restarted.startup_seconds,
        "after_the_restart": after.summary(),
        "exit_code_after_sigterm": code,
        **environment(),
    }


def _save(config: RunConfig, root: Path, adapters: int) -> list[Path]:
    """Saves two versions of each adapter with random weights, and returns their folders in order."""
    model, task = load_base(config.model, get_task(config.task.name), config.train.seed), get_task(config.task.name)
    names = [f"adapter{number}{version}" for number in range(adapters) for version in "ab"]
    for name in names:
        inject(model, config.lora, name)
    generator = torch.Generator().manual_seed(config.train.seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for weights in layer.adapters.values():
                weights.lora_B.normal_(0, STD, generator=generator)
        for head in adapter_heads(model).values():
            for parameter in head.modules_to_save.parameters():
                parameter.normal_(0, STD, generator=generator)
    for name in names:
        save_adapter(model, root / name, name, task.name)
        (root / name / RUN_CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return [root / name for name in names]


def _base_mib(config: RunConfig) -> float:
    """The size of the base's parameters and buffers."""
    model = load_base(config.model, get_task(config.task.name), config.train.seed)
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers())) / 2**20


def _offline(folders: list[Path], texts: list[str], column: str, precision: str) -> dict[str, list[dict[str, Any]]]:
    saved = {folder.name: find_saved_model(folder) for folder in folders}
    predictor = MultiAdapterPredictor.load(saved, precision)
    expected = {}
    for folder in folders:
        logits = predictor.logits([(folder.name, {column: text}) for text in texts])
        expected[digest_of(folder)] = [saved[folder.name].task.format_answer(row) for row in logits]
    return expected


def _drive(server: Server, load: Load, clients: int, seconds: float, meanwhile: Callable[[], None]) -> Tally:
    """Sends requests through `clients` connections for `seconds`, each after the response to the one before."""
    tally = Tally()
    senders = [_Client(server, load, tally, number) for number in range(clients)]

    async def send_all() -> None:
        end = time.perf_counter() + seconds
        tasks = [asyncio.to_thread(meanwhile), _watch_memory(server, tally, end)]
        await asyncio.gather(*tasks, *(each.run_until(end) for each in senders))

    start = time.perf_counter()
    try:
        asyncio.run(asyncio.wait_for(send_all(), seconds + TIMEOUT))
    except asyncio.TimeoutError:
        raise TrainingError(f"benchmark serve: the server did not answer a request within {TIMEOUT} s") from None
    tally.seconds = time.perf_counter() - start
    return tally


async def _watch_memory(server: Server, tally: Tally, end: float) -> None:
    while time.perf_counter() < end:
        tally.memory.append(await asyncio.to_thread(server.memory_mib))
        await asyncio.sleep(1)


def _usual_memory(tally: Tally) -> float:
    """The median over the second half, in MiB: it varies with the size of the last batches."""
    return float(np.median(tally.memory[len(tally.memory) // 2 :]))


class _Client:
    """A client. It leaves the CPU to the server: it checks a response that repeats only once."""

    def __init__(self, server: Server, load: Load, tally: Tally, number: int) -> None:
        self.server, self.load, self.tally = server, load, tally
        self.count = number * 7919  # clients start at different texts
        self.checked: dict[tuple[str, int, bytes], str | None] = {}

    async def run_until(self, end: float) -> None:
        while time.perf_counter() < end:
            await self._connect(end)

    async def _connect(self, end: float) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            with closing(writer):
                while time.perf_counter() < end:
                    await self._classify(reader, writer)
        except (OSError, EOFError, ValueError) as error:
            self.tally.errors.append(repr(error))
            await asyncio.sleep(0.05)  # the next request uses a new connection

    async def _classify(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = self.load.names[self.count % len(self.load.names)]
        text = self.count // len(self.load.names) % len(self.load.texts)
        self.count += 1
        start = time.perf_counter()
        writer.write(self._request({"adapter": name, "inputs": [self.load.texts[text]]}))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        content = await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
        self.tally.latencies.append(time.perf_counter() - start)
        if head.split()[1] == "200":
            self._check(name, text, content)
        else:
            self.tally.errors.append(content.decode(errors="replace")[:300])

    def _request(self, body: dict[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/classify HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.server.token}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def _check(self, name: str, text: int, content: bytes) -> None:
        key = (name, text, content)
        if key not in self.checked:
            response = json.loads(content)
            self.tally.versions.add(response["version"])
            expected = self.load.expected.get(response["version"])
            correct = (
                response["adapter"] == name
                and expected is not None
                and is_close(response["answers"], expected[text], self.load.tolerance)
            )
            self.checked[key] = None if correct else f"{name}: {response} instead of {expected and expected[text]}"
        if wrong := self.checked[key]:
            self.tally.wrong.append(wrong)


def is_close(answers: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> bool:
    """Whether the only answer is the expected one. If two labels are equally probable, either is correct."""
    (answer,) = answers
    found, wanted = answer["probabilities"], expected["probabilities"]
    close = found.keys() == wanted.keys() and all(abs(found[name] - wanted[name]) <= tolerance for name in wanted)
    return close and wanted[answer["label"]] >= max(wanted.values()) - 2 * tolerance


class _Replacer:
    """Replaces one adapter after another by its other version, evenly spread over `seconds`."""

    def __init__(self, server: Server, names: list[str], folders: list[str], times: int, seconds: float) -> None:
        self.server, self.names, self.folders, self.times, self.seconds = server, names, folders, times, seconds
        self.done, self.failed = 0, 0
        self.milliseconds: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        for turn in range(self.times):
            wait = start + (turn + 0.5) * self.seconds / self.times - time.perf_counter()
            time.sleep(max(0.0, wait))
            index, version = turn % len(self.names), (turn // len(self.names) + 1) % 2
            request_start = time.perf_counter()
            folder = {"folder": self.folders[2 * index + version]}
            status, _ = self.server.request("PUT", f"/v1/adapters/{self.names[index]}", folder)
            self.milliseconds.append((time.perf_counter() - request_start) * 1e3)
            self.done += status == 200
            self.failed += status != 200


def _mean_since(before: str, after: str, name: str) -> float:
    """The mean of a Prometheus histogram, over all its labels, of what was observed between two states of it."""

    def total(metrics: str, suffix: str) -> float:
        lines = (line.split() for line in metrics.splitlines() if line.startswith(f"{name}_{suffix}"))
        return sum(float(line[-1]) for line in lines)

    count = total(after, "count") - total(before, "count")
    return (total(after, "sum") - total(before, "sum")) / count if count else 0.0
