"""`serve-texts`: tokens per second and the first token of streamed texts, alone and together, of two adapters.

The texts have different lengths, and the clients begin one after another, so that their prompts do not all arrive at
once. Tokens count while all clients are there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import load_saved_model, save_adapter
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.generate import base_end_tokens
from lora_hf.lora.inject import inject, lora_layers
from lora_hf.models.load import DTYPES, load_base
from tools.benchmark.rounds import environment, with_resolved_precision
from tools.benchmark.server import TIMEOUT, memory_mib, memory_without_models, running_server

logger = logging.getLogger(__name__)

STD = 0.02  # of every B, so that the adapters write different texts
NAMES = ("one", "two")
PROMPTS = tuple(
    f"Write a short story about {who} who {what}."
    for who in ("a sailor", "a baker", "an old teacher", "a young doctor")
    for what in ("finds a map", "loses a key", "meets a friend after many years", "learns to fly")
)
TRANSFORMERS_SERVE = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@dataclass
class Texts:
    """What the clients saw in one part. `tokens` are those from `start` to `end`. Times are in seconds."""

    start: float = 0.0
    end: float = 0.0
    tokens: int = 0
    requests: int = 0
    first: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    texts: dict[tuple[str, int], set[str]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        p50, p99 = np.quantile(self.first, [0.5, 0.99]) if self.first else (0.0, 0.0)
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / (self.end - self.start),
            "first_token_p50_ms": float(p50) * 1e3,
            "first_token_p99_ms": float(p99) * 1e3,
            "errors": len(self.errors),
            "examples": self.errors[:5],
        }


def benchmark_texts(
    config: RunConfig, clients: int = 16, seconds: float = 20.0, new_tokens: int = 64
) -> dict[str, Any]:
    """Measures a server with two random adapters on a chat model, and returns the record.

    One client streams one text after another; then `clients` do so at once, of one adapter and of both. Then the same
    number of clients asks `transformers serve` for texts of the base alone.

    Raises:
        ConfigError: a number below one, or a base without a chat template.
        TrainingError: the server did not start.
    """
    if min(clients, seconds, new_tokens) < 1:
        raise ConfigError(f"--clients {clients} --seconds {seconds:g} --new-tokens {new_tokens}: expected at least 1")
    config = with_resolved_precision(config)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = save_adapters(config, root)
        expected, base_mib = _offline(folders, config.model.precision, 2 * new_tokens)
        token = secrets.token_hex(16)
        limits = ("--max-new-tokens", str(2 * new_tokens), "--deadline", str(TIMEOUT))  # a slow text is no error
        server = stack.enter_context(running_server(folders, root, config.model.precision, token, *limits))
        memory = {
            "base_mib": base_mib,
            "without_models_mib": memory_without_models(),
            "before_mib": server.memory_mib(),
        }
        parts: dict[str, Texts] = {}
        for part, count, names in (
            ("alone", 1, NAMES[:1]),
            ("one_adapter", clients, NAMES[:1]),
            ("two_adapters", clients, NAMES),
        ):
            logger.info("benchmark: %s, %d clients", part, count)
            parts[part] = _drive(server.port, token, names, count, seconds, new_tokens)
        memory["after_mib"] = server.memory_mib()
        wrong = sum(
            not expected[key].startswith(text.rstrip("\ufffd"))
            for each in parts.values()
            for key, texts in each.texts.items()
            for text in texts
        )
        server.process.terminate()
        server.process.wait(60)
        peer = _transformers(config, root, clients, seconds, new_tokens)
    found = {part: each.summary() for part, each in parts.items()}
    speed = {part: each["tokens_per_second"] for part, each in found.items()}
    return {
        "work": {
            "model": Path(config.model.name).name,
            "precision": config.model.precision,
            "clients": clients,
            "seconds": seconds,
            "new_tokens": new_tokens,
            "prompts": len(PROMPTS),
            "lora": config.to_dict()["lora"],
        },
        **found,
        "speedup": speed["two_adapters"] / speed["alone"],
        "two_adapters_over_one": speed["two_adapters"] / speed["one_adapter"],
        "wrong": wrong,
        "memory": memory,
        "transformers_serve": peer,
        **environment(),
    }


def save_adapters(config: RunConfig, root: Path) -> dict[str, Path]:
    """Saves the two adapters with random weights."""
    task = get_task(config.task.name)
    model = load_base(config.model, task, config.train.seed)
    generator = torch.Generator().manual_seed(config.train.seed)
    for name in NAMES:
        inject(model, config.lora, name)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for weights in layer.adapters.values():
                weights.lora_B.normal_(0, STD, generator=generator)
    for name in NAMES:
        save_adapter(model, root / name, name, task.name)
        (root / name / RUN_CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return {name: root / name for name in NAMES}


@torch.inference_mode()
def _offline(folders: dict[str, Path], precision: str, new_tokens: int) -> tuple[dict[tuple[str, int], str], float]:
    """The text of each adapter for each prompt, generated alone, and the size of the base in MiB."""
    expected, size = {}, 0.0
    for name, folder in folders.items():
        model, tokenizer = load_saved_model(find_saved_model(folder), precision)
        tokenizer_: Any = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"benchmark serve-texts: expected a base with a chat template, found {model.name_or_path}"
            )
        for number, prompt in enumerate(PROMPTS):
            messages = [{"role": "user", "content": prompt}]
            ids = torch.tensor(
                [tokenizer_.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)]
            )
            made = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=base_end_tokens(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
            expected[name, number] = tokenizer_.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        parameters = [each for path, each in model.named_parameters() if "lora_" not in path]
        size = sum(each.numel() * each.element_size() for each in parameters) / 2**20
    return expected, size


def _drive(port: int, token: str, names: tuple[str, ...], clients: int, seconds: float, new_tokens: int) -> Texts:
    """Streams texts through `clients` connections for `seconds`, each after the end of the one before."""
    seen = Texts()
    ramp = seconds / 4 if clients > 1 else 0.0

    async def client(number: int) -> None:
        await asyncio.sleep(number * ramp / clients)
        count = number
        while time.perf_counter() < seen.end:
            name, prompt = names[count % len(names)], count // len(names) % len(PROMPTS)
            length = new_tokens // 2 + count * 7919 % new_tokens
            await _stream(port, token, name, prompt, length, seen)
            count += clients

    async def run() -> None:
        seen.start = time.perf_counter() + ramp
        seen.end = seen.start + seconds
        await asyncio.gather(*map(client, range(clients)))

    asyncio.run(asyncio.wait_for(run(), ramp + seconds + TIMEOUT))
    return seen


async def _stream(port: int, token: str, model: str, prompt: int, new_tokens: int, seen: Texts) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPTS[prompt]}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
    }
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    start, text = time.perf_counter(), ""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with closing(writer):
            writer.write(head.encode() + content)
            status = (await reader.readline()).decode()
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                message = json.loads(line[6:])
                if "error" in message:
                    raise ValueError(str(message["error"])[:300])
                piece = (message["choices"] or [{"delta": {}}])[0]["delta"].get("content")
                if piece:
                    now = time.perf_counter()
                    if not text:
                        seen.first.append(now - start)
                    text += piece
                    # At a temperature of 0 nearly every token is a piece of its own.
                    seen.tokens += seen.start <= now <= seen.end
            if " 200 " not in status:
                raise ValueError(status)
    except (OSError, EOFError, ValueError, KeyError) as error:
        seen.errors.append(repr(error)[:300])
        await asyncio.sleep(0.05)
        return
    seen.requests += 1
    seen.texts.setdefault((model, prompt), set()).add(text)


def _transformers(config: RunConfig, root: Path, clients: int, seconds: float, new_tokens: int) -> dict[str, Any]:
    """The same load on `transformers serve` in the same precision, or why it does not run here."""
    model = config.model.name
    try:
        with _transformers_server(model, config.model.precision, root) as (port, pid):
            alone = _drive(port, "", (model,), 1, seconds / 2, new_tokens)
            together = _drive(port, "", (model,), clients, seconds, new_tokens)
            return {"alone": alone.summary(), "together": together.summary(), "memory_mib": memory_mib(pid)}
    except (TrainingError, asyncio.TimeoutError, OSError) as error:
        return {"reason": str(error) or type(error).__name__}


@contextmanager
def _transformers_server(model: str, precision: str, root: Path) -> Iterator[tuple[int, int]]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / "transformers.log"
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--continuous-batching"]
    words += ["--dtype", str(DTYPES[precision]).removeprefix("torch.")]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", TRANSFORMERS_SERVE, *words], stdout=output, stderr=output, cwd=root
        )
        try:
            start = time.perf_counter()
            while time.perf_counter() - start < TIMEOUT and process.poll() is None:
                with closing(socket.socket()) as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            else:
                raise TrainingError(f"transformers serve did not start: {log.read_text(encoding='utf-8')[-1000:]}")
            first = _drive(port, "", (model,), 1, 1.0, 4)  # it loads the model with the first request
            if first.errors:
                tail = log.read_text(encoding="utf-8")[-1000:]
                raise TrainingError(f"transformers serve does not answer: {first.errors[0]}: {tail}")
            yield port, process.pid
        finally:
            process.kill()
            process.wait()
