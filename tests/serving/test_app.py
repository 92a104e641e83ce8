"""The HTTP interface in process: every answer and every refusal."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lora_hf.adapters.format import CONFIG_FILE
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.inference.classify import Predictor
from lora_hf.serving.answers import answer_of
from lora_hf.serving.app import ServerState
from lora_hf.serving.client import Pending
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import DeadlinePassedError, Limits
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.middleware import AccessMiddleware
from lora_hf.serving.requests import digest_of
from tests import tolerances
from tests.support.engine_client import ThreadClient, app_of
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.waiting import LIMIT

TOKEN = "a-token-of-this-test"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
LIMITS = Limits(max_inputs=4, max_queue=8, max_characters=200, max_new_tokens=32, max_bytes=4000, deadline=600)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("allowed")
    tasks = {"a": "rule-sentiment", "b": "rule-sentiment", "pair": "rte", "score": "stsb", "w": "rule-restaurants"}
    return {name: save_random(root / name, task, seed) for seed, (name, task) in enumerate(tasks.items())}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    with Engine(LIMITS, "fp32", Metrics()) as engine:
        for name, folder in folders.items():
            if name != "b":
                engine.load(name, folder)
        yield engine


def client_of(engine: Engine, state: ServerState) -> TestClient:
    client = ThreadClient(engine, engine._observer)  # type: ignore[arg-type]
    return TestClient(app_of(client, state), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with client_of(engine, ServerState(ready=True)) as client:
        yield client


@pytest.fixture
def guarded(engine: Engine, folders: dict[str, Path]) -> Iterator[TestClient]:
    with client_of(engine, ServerState(TOKEN, folders["a"].parent, ready=True)) as client:
        yield client


def test_classify_matches_predict(client: TestClient, folders: dict[str, Path]) -> None:
    found = client.post("/v1/classify", json={"adapter": "a", "inputs": list(TEXTS)})
    wanted = Predictor.load(find_saved_model(folders["a"]), "fp32").predict({"sentence": list(TEXTS)})
    assert found.status_code == 200
    assert (found.json()["adapter"], found.json()["version"]) == ("a", digest_of(folders["a"]))
    for answer, expected in zip(found.json()["answers"], wanted, strict=True):
        assert answer["label"] == expected["label"]
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=tolerances.SERVED_PROBABILITY)


def test_pairs_and_regressions(client: TestClient, folders: dict[str, Path]) -> None:
    for name in ("pair", "score"):
        found = client.post("/v1/classify", json={"adapter": name, "inputs": [TEXTS[:2], TEXTS[2:]]}).json()["answers"]
        columns = {"sentence1": [TEXTS[0], TEXTS[2]], "sentence2": [TEXTS[1], TEXTS[3]]}
        wanted = Predictor.load(find_saved_model(folders[name]), "fp32").predict(columns)
        key = "label" if name == "pair" else "score"
        if key == "label":
            assert [answer[key] for answer in found] == [answer[key] for answer in wanted]
        else:
            wanted_scores = [answer[key] for answer in wanted]
            assert [answer[key] for answer in found] == pytest.approx(wanted_scores, abs=tolerances.SERVED_PROBABILITY)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"])
def test_a_file_is_read_as_predict_reads_it(suffix: str, client: TestClient, tmp_path: Path) -> None:
    table, file = pandas.DataFrame({"sentence": TEXTS}), tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        table.to_parquet(file)
    elif "json" in suffix:
        table.to_json(file, orient="records", lines=suffix == ".jsonl")
    else:
        text = table.to_csv(index=False, sep="\t" if suffix == ".tsv" else ",")
        file.write_text(text if suffix != ".txt" else "\n".join(TEXTS))
    body = {"adapter": "a", "name": file.name, "content": b64encode(file.read_bytes()).decode()}
    assert client.post("/v1/rows", json=body).json() == {"rows": [[text] for text in TEXTS]}


def test_a_file_that_the_task_cannot_read_is_refused(client: TestClient) -> None:
    def refusal(adapter: str, name: str, content: bytes) -> tuple[int, str]:
        body = {"adapter": adapter, "name": name, "content": b64encode(content).decode()}
        found = client.post("/v1/rows", json=body)
        return found.status_code, found.json()["error"]["message"]

    assert refusal("a", "rows.csv", b"text\nx\n")[1].startswith("rows.csv: ")
    assert refusal("pair", "rows.txt", b"x\n")[0] == 422
    for name in ("rows.xlsx", "rows", "../../etc/passwd", "rows.\0"):
        assert refusal("a", name, b"x\n")[0] == 422
    prompts = "\n".join(PROMPTS).encode()
    body = {"adapter": "w", "name": "prompts.txt", "content": b64encode(prompts).decode()}
    assert client.post("/v1/rows", json=body).json()["rows"] == [[prompt] for prompt in PROMPTS]


def test_generate_whole_and_streamed(client: TestClient, engine: Engine) -> None:
    body = {"adapter": "w", "prompt": PROMPTS[1], "max_new_tokens": 20}
    whole = client.post("/v1/generate", json=body)
    assert whole.status_code == 200
    assert whole.json()["text"] == engine.generate("w", PROMPTS[1], max_new_tokens=20).text
    streamed = client.post("/v1/generate", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in streamed.text.strip().split("\n\n")]
    parsed = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]
    assert [name for name, _ in parsed[:-1]] == ["text"] * (len(parsed) - 1)
    assert parsed[-1] == ("done", whole.json())
    assert "".join(data["text"] for _, data in parsed[:-1]) == whole.json()["text"]
    sampled = [client.post("/v1/generate", json={**body, "temperature": 1.5, "seed": 3}).json() for _ in range(2)]
    assert sampled[0] == sampled[1] != whole.json()


CLASSIFY, GENERATE = "/v1/classify", "/v1/generate"


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "message"),
    [
        (CLASSIFY, {"adapter": "aa", "inputs": ["x"]}, 404, "unknown_adapter", "did you mean 'a'"),
        (CLASSIFY, {"adapter": "w", "inputs": ["x"]}, 400, "wrong_kind", "use generate instead"),
        (CLASSIFY, {"adapter": "a", "inputs": []}, 422, "invalid_request", "inputs: List should have at least 1 item"),
        (CLASSIFY, {"adapter": "a", "inputs": [" "]}, 422, "bad_input", "inputs[0]: expected a text"),
        (CLASSIFY, {"adapter": "a", "inputs": ["x"] * 5}, 413, "too_large", "at most 4 items"),
        (CLASSIFY, {"adapter": "a", "inputs": ["x", "x" * 201]}, 413, "too_large", "inputs.1.text: String should"),
        (CLASSIFY, {"adapter": "pair", "inputs": [["x", "x" * 201]]}, 413, "too_large", "inputs.0.pair.1: String"),
        (CLASSIFY, {"adapter": "a", "inputs": [1]}, 422, "invalid_request", "inputs.0.text: Input should be a"),
        (CLASSIFY, {"adapter": "pair", "inputs": ["x"]}, 422, "bad_input", "reads 2 texts (sentence1, sentence2)"),
        (CLASSIFY, {"adapter": "a", "inputs": ["x"], "top": 1}, 422, "invalid_request", "top: Extra inputs"),
        (CLASSIFY, {"inputs": ["x"]}, 422, "invalid_request", "adapter: Field required"),
        (CLASSIFY, {"adapter": "a", "inputs": ["x"], "deadline": 601}, 413, "too_large", "less than or equal to 600"),
        (GENERATE, {"adapter": "w", "prompt": "name[A], eatTipe[pub]"}, 422, "bad_input", "did you mean 'eatType'"),
        (GENERATE, {"adapter": "w", "prompt": "x" * 201}, 413, "too_large", "at most 200 characters"),
        (GENERATE, {"adapter": "w", "prompt": "name[A]", "num_beams": 17}, 413, "too_large", "num_beams"),
        (GENERATE, {"adapter": "w", "prompt": "name[A]", "num_beams": "2"}, 422, "invalid_request", "valid integer"),
        ("/v1/classified", {}, 404, "not_found", "Not Found"),
    ],
)  # fmt: skip
def test_refusals(path: str, body: Any, status: int, code: str, message: str, client: TestClient) -> None:
    found = client.post(path, json=body)
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert message in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'{"adapter": "a", ', {}, 400, "malformed_json"),
        (b"\xff\xfe", {}, 400, "malformed_json"),
        (b'"\xff"', {}, 400, "bad_request"),
        (b"[" * 3000, {}, 400, "malformed_json" if sys.version_info >= (3, 13) else "bad_request"),  # too deep before
        (b'{"adapter": "a", "inputs": ["\\ud800"]}', {}, 422, "invalid_request"),
        (b'{"adapter": "a", "inputs": ["x"], "deadline": NaN}', {}, 422, "invalid_request"),
        (b'{"adapter": "a", "inputs": ["x"]}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}" + b" " * 4000, {}, 413, "too_large"),
        (b"{}", {"content-length": "99999999999999"}, 413, "too_large"),
        (b"", {}, 422, "invalid_request"),
    ],
)
def test_invalid_bodies(content: bytes, headers: dict, status: int, code: str, client: TestClient) -> None:
    found = client.post(CLASSIFY, content=content, headers={"content-type": "application/json", **headers})
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)


def test_a_body_of_unknown_length_is_read_only_up_to_the_limit() -> None:
    read, sent = [], []

    async def receive() -> dict[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CLASSIFY, "headers": []}
    asyncio.run(AccessMiddleware(None, None, LIMITS, Metrics())(scope, receive, send))
    assert len(read) == 5
    assert sent[0]["status"] == 413


def test_a_full_queue_and_a_passed_deadline(client: TestClient, engine: Engine) -> None:
    blocked, resume = threading.Event(), threading.Event()
    engine._current["a"][1].call(lambda: blocked.set() or resume.wait())
    assert blocked.wait(LIMIT)
    try:
        late = client.post(CLASSIFY, json={"adapter": "a", "inputs": ["x"], "deadline": 0.05})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_passed")
        waiting = [engine.submit_classify("a", ["x"] * 4) for _ in range(2)]
        full = client.post(CLASSIFY, json={"adapter": "a", "inputs": ["x"]})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        assert 'lora_hf_queue_rows{base="tiny-roberta"} 8.0' in client.get("/metrics").text
    finally:
        resume.set()
    for request in waiting:
        request.future.result(LIMIT)


def test_health_readiness_and_metrics(engine: Engine) -> None:
    state = ServerState()
    with client_of(Engine(LIMITS, observer=Metrics()), state) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert (client.get("/readyz").status_code, client.get("/readyz").json()["error"]["code"]) == (503, "loading")
        asked = client.post(CLASSIFY, json={"adapter": "a", "inputs": ["x"]})
        assert (asked.status_code, asked.json()["error"]["code"]) == (503, "loading")
        state.ready = True
        assert client.get("/readyz").json() == {"status": "ready"}
        state.draining = True
        assert client.get("/readyz").json()["error"]["code"] == "closing"
        page = client.get("/metrics").text
        assert 'lora_hf_requests_total{route="/v1/classify",status="503"} 1.0' in page
        assert "lora_hf_adapters 0.0" in page


def test_every_path_requires_the_token(guarded: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    paths = ["/v1/adapters", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/nowhere"]
    for headers in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": TOKEN}, {"authorization": "Bearer é"}):
        for path in paths:
            found = guarded.get(path, headers={key: value.encode() for key, value in headers.items()})
            assert (found.status_code, found.json()["error"]["code"]) == (401, "unauthorized")
    assert guarded.get("/v1/adapters", headers=AUTHORIZED).status_code == 200
    answer = guarded.post(CLASSIFY, json={"adapter": "a", "inputs": ["a secret text"]}, headers=AUTHORIZED)
    assert answer.status_code == 200
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("lora_hf"))
    assert "POST /v1/classify 200" in ours
    assert TOKEN not in ours
    assert "secret" not in ours


def test_adapters_are_loaded_replaced_and_removed(guarded: TestClient, folders: dict[str, Path]) -> None:
    def put(name: str, folder: str) -> Any:
        return guarded.put(f"/v1/adapters/{name}", json={"folder": folder}, headers=AUTHORIZED)

    for folder in ("b", "a", "b"):
        assert put("new", folder).json()["version"] == digest_of(folders[folder])
    listed = {each["name"]: each for each in guarded.get("/v1/adapters", headers=AUTHORIZED).json()["adapters"]}
    assert listed["new"] == {
        "name": "new",
        "version": digest_of(folders["b"]),
        "base": "tiny-roberta",
        "task": "rule-sentiment",
        "kind": "sequence-classification",
        "labels": ["negative", "positive"],
        "reads": ["sentence"],
        "chat": False,
        "embeds": True,
    }
    assert guarded.delete("/v1/adapters/new", headers=AUTHORIZED).status_code == 200
    assert guarded.delete("/v1/adapters/new", headers=AUTHORIZED).status_code == 404
    assert put("a b", "a").json()["error"]["code"] == "bad_adapter"


def test_an_adapter_that_others_replace_is_described_when_it_is_removed(
    guarded: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded.put("/v1/adapters/new", json={"folder": "b"}, headers=AUTHORIZED)
    monkeypatch.setattr(engine, "adapters", list)  # as before another client's load
    removed = guarded.delete("/v1/adapters/new", headers=AUTHORIZED)
    assert (removed.status_code, removed.json()["name"]) == (200, "new")


def test_only_folders_below_the_adapter_root_are_loaded(
    guarded: TestClient, folders: dict[str, Path], tmp_path: Path
) -> None:
    root = folders["a"].parent
    outside = save_random(tmp_path / "outside", seed=4)
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    for file in outside.iterdir():
        (root / "half" / file.name).symlink_to(file)
    (root / "empty").mkdir()
    inside = save_random(root / "run" / "adapter", seed=4)
    links = {"merge": "merge.json", "combine": "combine.json", "config": "config.yaml", "run": "../config.yaml"}
    for name, link in links.items():
        shutil.copytree(inside, root / f"linked-{name}" / "adapter")
        (root / f"linked-{name}" / "adapter" / link).symlink_to(outside / CONFIG_FILE)
    for folder in (
        *(f"linked-{name}/adapter" for name in links),
        str(outside),
        "../outside",
        f"a/../../{outside.name}",
        "link",
        "half",
        ".",
        "a\0",
        "a\\b",
        "a" * 1000,
        "nowhere",
    ):
        found = guarded.put("/v1/adapters/a", json={"folder": folder}, headers=AUTHORIZED)
        assert (found.status_code, found.json()["error"]["code"]) == (403, "outside"), folder
        assert str(tmp_path) not in found.text or folder == str(outside)
    found = guarded.put("/v1/adapters/a", json={"folder": "empty"}, headers=AUTHORIZED)
    assert (found.status_code, found.json()["error"]["code"]) == (422, "bad_adapter")
    assert str(root) not in found.text
    listed = {each["name"]: each for each in guarded.get("/v1/adapters", headers=AUTHORIZED).json()["adapters"]}
    assert listed["a"]["version"] == digest_of(folders["a"]), "the old version is still served"


def test_loading_is_off_by_default(client: TestClient) -> None:
    for found in (client.put("/v1/adapters/new", json={"folder": "a"}), client.delete("/v1/adapters/a")):
        assert (found.status_code, found.json()["error"]["code"]) == (403, "loading_off")


def test_a_disconnect_cancels_the_request() -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def ask() -> Pending:
        pending = Pending(asyncio.get_running_loop().create_future(), time.monotonic() + LIMIT)
        with pytest.raises(DeadlinePassedError):
            await answer_of(gone, pending)
        return pending

    assert asyncio.run(ask()).future.cancelled()


def test_the_page_needs_no_token_and_loads_nothing(guarded: TestClient) -> None:
    found = guarded.get("/")
    assert (found.status_code, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not re.findall(r"(?:src|href)=|url\(|//[a-z]+\.", found.text)
    assert "connect-src 'self'" in found.headers["content-security-policy"]
    assert guarded.post("/").status_code == 401


def test_the_docs_load_nothing_from_other_hosts(client: TestClient) -> None:
    page = client.get("/docs").text
    files = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert len(files) >= 3
    assert "//" not in "".join(files)
    for file in files:
        assert client.get(file).status_code == 200, file


CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ROWS = "/v1/rows"
WITH_BODY = (
    *(("POST", path) for path in (CLASSIFY, GENERATE, ROWS, CHAT, COMPLETE, EMBED)),
    ("PUT", "/v1/adapters/{name}"),
)
OPERATIONS = (
    *WITH_BODY,
    ("DELETE", "/v1/adapters/{name}"),
    *(("GET", path) for path in ("/v1/adapters", "/v1/models", "/healthz", "/readyz", "/metrics")),
)
MODES = [(*each, GenerationMode.POSITIVE) for each in OPERATIONS] + [
    (*each, GenerationMode.NEGATIVE) for each in WITH_BODY
]


@pytest.fixture(scope="module")
def schema(engine: Engine, folders: dict[str, Path]) -> Any:
    """The server's own description, from which schemathesis makes requests; there are no adapters to load."""
    (folders["a"].parent / "nothing").mkdir()
    app = app_of(ThreadClient(engine), ServerState(adapter_root=folders["a"].parent / "nothing", ready=True))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    assert {(o.ok().method.upper(), o.ok().path) for o in schema.get_all_operations()} == set(OPERATIONS)
    return schema


@pytest.mark.full
@pytest.mark.parametrize(("method", "path", "mode"), MODES)
def test_generated_requests_get_documented_responses(method: str, path: str, mode: GenerationMode, schema: Any) -> None:
    operation = schema[path][method]
    statuses = set()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("adapter"), str):
            case.body["adapter"] = "w" if path == GENERATE else "a"  # otherwise nearly all would end at an unknown name
            if isinstance(case.body.get("prompt"), str) and len(case.body["prompt"]) % 2:
                case.body["prompt"] = PROMPTS[0]
        elif isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "a" if path == EMBED else "w"
        if isinstance(case.body, dict) and isinstance(case.body.get("deadline"), float) and case.body["deadline"] > 0:
            case.body["deadline"] = max(case.body["deadline"], LIMITS.deadline)  # a shorter one may pass
        response = case.call()
        assert response.status_code < 500, response.content
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    check()
    assert statuses, "no request was made"


def test_answers_are_unchanged_afterwards(client: TestClient, folders: dict[str, Path]) -> None:
    test_classify_matches_predict(client, folders)
