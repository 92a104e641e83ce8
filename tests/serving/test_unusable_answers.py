"""Over HTTP, an answer that is not finite is an error, and one for the start of a text says so."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_hf.adapters.format import WEIGHTS_FILE
from lora_hf.serving.app import CLASSIFY, ServerState
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import Limits
from tests.support.engine_client import ThreadClient, app_of
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.waiting import LIMIT

TASKS = {
    "a": "rule-sentiment",
    "pair": "rte",
    "huge": "rule-sentiment",
    "huge-score": "stsb",
    "writer": "rule-restaurants",
}
TASKS["huge-writer"] = TASKS["writer"]


def overflowing(folder: Path) -> Path:
    """Changes an adapter with finite weights so that its products are infinite."""
    file = folder / WEIGHTS_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {key: value.sign() * 1e30 if "lora_B" in key else value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("adapters")
    with Engine(Limits(deadline=LIMIT), "fp32") as engine:
        for seed, (name, task) in enumerate(TASKS.items()):
            folder = save_random(root / name, task, seed)
            engine.load(name, overflowing(folder) if name.startswith("huge") else folder)
        with TestClient(app_of(ThreadClient(engine), ServerState(ready=True))) as client:
            yield client


def not_json(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CLASSIFY, {"adapter": "huge", "inputs": list(TEXTS)}),
        (CLASSIFY, {"adapter": "huge-score", "inputs": [list(TEXTS[:2])]}),
        ("/v1/generate", {"adapter": "huge-writer", "prompt": PROMPTS[0], "num_beams": 1, "max_new_tokens": 4}),
        ("/v1/generate", {"adapter": "huge-writer", "prompt": PROMPTS[0], "num_beams": 3, "max_new_tokens": 4}),
    ],
)
def test_answers_that_are_not_finite_are_errors(path: str, body: dict[str, Any], client: TestClient) -> None:
    found = client.post(path, json=body)
    assert found.status_code == 500
    error = json.loads(found.text, parse_constant=not_json)["error"]
    assert error["code"] == "broken_adapter"
    assert body["adapter"] in error["message"]


def test_a_stream_ends_with_the_error(client: TestClient) -> None:
    body = {"adapter": "huge-writer", "prompt": PROMPTS[0], "num_beams": 1, "max_new_tokens": 4, "stream": True}
    *_, last = client.post("/v1/generate", json=body).text.strip().split("\n\n")
    assert last.startswith("event: error\n")
    assert json.loads(last.partition("data: ")[2], parse_constant=not_json)["error"]["code"] == "broken_adapter"


def test_truncated_texts_are_listed(client: TestClient) -> None:
    def truncated(adapter: str, *inputs: Any) -> list[int]:
        return client.post(CLASSIFY, json={"adapter": adapter, "inputs": inputs}).json()["truncated"]

    longest = bisect_left(range(1000), True, key=lambda words: bool(words and truncated("a", "film " * words))) - 1
    fits, cut = "film " * longest, "film " * (longest + 1)
    assert truncated("a", cut, fits, "film", cut) == [0, 3]
    assert truncated("a", *[fits, "film " * 1900] * 3) == [1, 3, 5], "more than are tokenized at a time"
    assert truncated("pair", ["film", fits], ["film", "film"], [cut, "film"]) == [0, 2]
