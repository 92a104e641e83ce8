"""Measures a server from outside: clients over loopback, adapters replaced meanwhile, every answer checked."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import logging
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import save_adapter
from lora_hf.core.child_process import package_environment
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.provenance import git_state, versions
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import MultiAdapterPredictor, format_prediction
from lora_hf.lora.inject import adapter_heads, inject, lora_layers
from lora_hf.lora.precision import resolve_precision
from lora_hf.models.load import load_base
from lora_hf.serving.requests import digest_of
from tools.benchmark.train import machine_in_use

logger = logging.getLogger(__name__)

STD = 0.05  # of every B and head: answers of two adapters must differ, or a mix-up would go unseen
# How far a served probability may be from the offline one, both rounded to four decimals: sums in another order, which
# in half precision round otherwise.
TOLERANCES = {"fp32": 1.001e-4, "bf16": 2e-2, "fp16": 4e-3}
SERVE = "import sys; from lora_hf.cli.main import main; sys.exit(main(verb='serve'))"
START_LIMIT = 120.0  # seconds


@dataclass
class Tally:
    """What the clients of one part saw. Latencies are seconds."""

    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Throughput, quantiles in milliseconds, and how many answers were wrong or missing."""
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
    """What is asked: an adapter of `names`, a text of `texts`; `expected` are the answers by version and text."""

    names: list[str]
    texts: list[str]
    expected: dict[str, list[dict[str, Any]]]
    tolerance: float


def benchmark_serving(
    config: RunConfig,
    clients: int = 16,
    adapters: int = 8,
    seconds: float = 20.0,
    replacements: int = 10,
    rows: int = 64,
) -> dict[str, Any]:
    """Serves `adapters` with random weights, asks one request at a time, then by `clients` at once; the record of it.

    During the second part adapters are replaced, `replacements` times in all, each by its other version. At the end the
    server is killed and started again.

    Raises:
        ConfigError: a number below one, or a task that does not classify one text.
        TrainingError: the server did not start.
    """
    if min(clients, adapters, seconds, rows) < 1 or replacements < 0:
        raise ConfigError("benchmark serve: expected at least one client, adapter, second and row")
    task = get_task(config.task.name)
    if task.model_kind != "sequence-classification" or len(task.text_columns) != 1:
        raise ConfigError(f"benchmark serve: expected a task that classifies one text, found {task.name}")
    precision = resolve_precision(config.model.precision)
    config = replace(config, model=replace(config.model, precision=precision))
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
        started = {name: folders[place * 2] for place, name in enumerate(load.names)}
        token = secrets.token_hex(16)
        server = stack.enter_context(_server(started, root, precision, token))
        logger.info("benchmark: one request at a time")
        alone = _drive(server, load, 1, max(1.0, seconds / 4), lambda: None)
        logger.info("benchmark: %d clients", clients)
        replacing = _Replacing(server, load.names, [folder.name for folder in folders], replacements, seconds)
        together = _drive(server, load, clients, seconds, replacing)
        page = server.ask("GET", "/metrics")[1].decode()
        server.process.kill()
        server.process.wait()
        again = stack.enter_context(_server(started, root, precision, token))
        after = _drive(again, load, 1, 1.0, lambda: None)
        again.process.terminate()
        code = again.process.wait(60)
    one, many = alone.summary(), together.summary()
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
        "one_at_a_time": one,
        "together": many | {"rows_of_a_batch": _mean(page, "lora_hf_batch_rows")},
        "ratio": many["per_second"] / one["per_second"],
        "replaced": {"times": replacing.done, "failed": replacing.failed, "milliseconds": replacing.milliseconds},
        "started_in_seconds": server.started,
        "started_again_in_seconds": again.started,
        "after_the_restart": after.summary(),
        "exit_code_after_sigterm": code,
        "machine": machine_in_use(),
        "versions": versions(),
        "git": git_state(),
    }


def _save(config: RunConfig, root: Path, adapters: int) -> list[Path]:
    """Two versions of each adapter, all of random weights, as folders that find their base again."""
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


def _offline(folders: list[Path], texts: list[str], column: str, precision: str) -> dict[str, list[dict[str, Any]]]:
    saved = {folder.name: find_saved_model(folder) for folder in folders}
    predictor = MultiAdapterPredictor.load(saved, precision)
    expected = {}
    for folder in folders:
        logits = predictor.logits([(folder.name, {column: text}) for text in texts])
        expected[digest_of(folder)] = [format_prediction(saved[folder.name].task, row) for row in logits]
    return expected


@dataclass
class _Server:
    process: subprocess.Popen
    port: int
    token: str
    started: float

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()


@contextmanager
def _server(adapters: dict[str, Path], root: Path, precision: str, token: str) -> Iterator[_Server]:
    """A server in a process of its own, ready."""
    words = [word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")]
    words += ["--port", "0", "--allow-loading", str(root), "--precision", precision]
    environment = package_environment() | {"LORA_HF_TOKEN": token}
    begin = time.perf_counter()
    log = root / f"server-{time.monotonic_ns()}.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen([sys.executable, "-c", SERVE, *words], stderr=errors, env=environment)
        try:
            while time.perf_counter() - begin < START_LIMIT and process.poll() is None:
                said = log.read_text(encoding="utf-8")
                if "ready: " in said:
                    port = int(said.partition("http://127.0.0.1:")[2].partition(",")[0])
                    yield _Server(process, port, token, time.perf_counter() - begin)
                    return
                time.sleep(0.02)
            raise TrainingError(f"benchmark serve: the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
        finally:
            process.kill()
            process.wait()


def _drive(server: _Server, load: Load, clients: int, seconds: float, meanwhile: Callable[[], None]) -> Tally:
    """`clients` connections, on each of which one thing is asked after the other until the time is over."""
    asking = [_Asking(server, load, number) for number in range(clients)]

    async def all_of_them() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(asyncio.to_thread(meanwhile), *(each.until(end) for each in asking))

    begin = time.perf_counter()
    try:
        asyncio.run(asyncio.wait_for(all_of_them(), seconds + START_LIMIT))
    except asyncio.TimeoutError:
        raise TrainingError(f"benchmark serve: the server left a request without answer for {START_LIMIT} s") from None
    tallies = [each.tally for each in asking]
    return Tally(
        list(itertools.chain.from_iterable(tally.latencies for tally in tallies)),
        list(itertools.chain.from_iterable(tally.errors for tally in tallies)),
        list(itertools.chain.from_iterable(tally.wrong for tally in tallies)),
        set().union(*(tally.versions for tally in tallies)),
        time.perf_counter() - begin,
    )


class _Asking:
    """A client. It takes little of the machine, which is the server's: an answer that comes again is compared once."""

    def __init__(self, server: _Server, load: Load, number: int) -> None:
        self.server, self.load, self.tally = server, load, Tally()
        self.turn = number * 7919  # clients start at different texts
        self.known: dict[tuple[str, int, bytes], str | None] = {}

    async def until(self, end: float) -> None:
        while time.perf_counter() < end:
            await self._on_a_connection(end)

    async def _on_a_connection(self, end: float) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            with closing(writer):
                while time.perf_counter() < end:
                    await self._ask(reader, writer)
        except (OSError, EOFError, ValueError) as error:
            self.tally.errors.append(repr(error))
            await asyncio.sleep(0.05)  # the next is asked on another connection

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = self.load.names[self.turn % len(self.load.names)]
        place = self.turn // len(self.load.names) % len(self.load.texts)
        self.turn += 1
        begin = time.perf_counter()
        writer.write(self._request({"adapter": name, "inputs": [self.load.texts[place]]}))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        content = await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
        self.tally.latencies.append(time.perf_counter() - begin)
        if head.split()[1] == "200":
            self._check(name, place, content)
        else:
            self.tally.errors.append(content.decode(errors="replace")[:300])

    def _request(self, body: dict[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/classify HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.server.token}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def _check(self, name: str, place: int, content: bytes) -> None:
        key = (name, place, content)
        if key not in self.known:
            answer = json.loads(content)
            self.tally.versions.add(answer["version"])
            expected = self.load.expected.get(answer["version"])
            right = (
                answer["adapter"] == name
                and expected is not None
                and same(answer["answers"], expected[place], self.load.tolerance)
            )
            self.known[key] = None if right else f"{name}: {answer} instead of {expected and expected[place]}"
        if wrong := self.known[key]:
            self.tally.wrong.append(wrong)


def same(answers: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> bool:
    """Whether the one answer is the expected one; where two labels are as probable, either may be named."""
    (answer,) = answers
    found, wanted = answer["probabilities"], expected["probabilities"]
    close = found.keys() == wanted.keys() and all(abs(found[name] - wanted[name]) <= tolerance for name in wanted)
    return close and wanted[answer["label"]] >= max(wanted.values()) - 2 * tolerance


class _Replacing:
    """Replaces one adapter after the other by its other version, evenly over the time."""

    def __init__(self, server: _Server, names: list[str], folders: list[str], times: int, seconds: float) -> None:
        self.server, self.names, self.folders, self.times, self.seconds = server, names, folders, times, seconds
        self.done, self.failed = 0, 0
        self.milliseconds: list[float] = []

    def __call__(self) -> None:
        begin = time.perf_counter()
        for turn in range(self.times):
            wait = begin + (turn + 0.5) * self.seconds / self.times - time.perf_counter()
            time.sleep(max(0.0, wait))
            place, version = turn % len(self.names), (turn // len(self.names) + 1) % 2
            started = time.perf_counter()
            folder = {"folder": self.folders[place * 2 + version]}
            status, _ = self.server.ask("PUT", f"/v1/adapters/{self.names[place]}", folder)
            self.milliseconds.append((time.perf_counter() - started) * 1e3)
            self.done += status == 200
            self.failed += status != 200


def _mean(page: str, name: str) -> float:
    """The mean of a histogram on the page of metrics, over all its labels."""
    lines = [line.split() for line in page.splitlines() if line.startswith((f"{name}_sum", f"{name}_count"))]
    total = sum(float(line[-1]) for line in lines if line[0].startswith(f"{name}_sum"))
    count = sum(float(line[-1]) for line in lines if line[0].startswith(f"{name}_count"))
    return total / count if count else 0.0
