"""The page in a real browser, and its errors in process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from lora_hf.serving.app import PLAYGROUND, ServerState, build_app
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import Limits
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.playground import BARE, USER, Callbacks
from tests.support.browser import Browser, browser, missing
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.waiting import LIMIT, wait_until

TOKEN = "a-token-of-this-test"
TASKS = {"a": "rule-sentiment", "pair": "rte", "score": "stsb", "writer": "rule-restaurants"}
CONTROL, ENTER = "\ue009", "\ue007"  # keys, in WebDriver's letters
SHOWN = "const box = document.querySelector(arguments[0]); return box && box.offsetParent && box.innerText.trim()"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("adapters")
    with Engine(Limits(max_inputs=4, max_new_tokens=16, deadline=LIMIT), "fp32", Metrics()) as engine:
        for seed, (name, task) in enumerate(TASKS.items()):
            engine.load(name, save_random(root / name, task, seed))
        yield engine


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    """The URL of the page, behind its login."""
    app = build_app(engine, ServerState(TOKEN, ready=True), Metrics(), playground=True)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def choose(page: Browser, box: str, name: str) -> None:
    """Replaces the text of a dropdown with the name and presses Enter."""
    page.click(f"{box} input")
    page.type(f"{box} input", f"{CONTROL}a{CONTROL}{name}")
    page.until("return document.querySelector(arguments[0])?.value === arguments[1]", f"{box} input", name)
    page.type(f"{box} input", ENTER)


@pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}")
def test_adapters_answer_in_a_browser(engine: Engine, address: str, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("LORA_HF_PICTURES", tmp_path))
    with browser() as page:
        page.open(address + PLAYGROUND)
        page.type("input[type=text], textarea", USER)
        page.type("input[type=password]", TOKEN)
        page.click("form button, button.lg, button")
        page.until("return document.querySelector('#ask-adapter input')?.value === 'a'")
        page.type("#ask-text textarea", TEXTS[0])
        page.click("#ask")
        shown = page.until(SHOWN, "#ask-label")
        wanted = engine.classify("a", [TEXTS[0]]).answers[0]
        assert wanted["label"] in shown
        assert f"{round(100 * max(wanted['probabilities'].values()))}%" in shown
        page.picture(pictures / "ask.png")

        page.click("button[role=tab]:nth-of-type(2)")
        choose(page, "#compare-one", "writer")
        choose(page, "#compare-other", BARE)
        page.type("#compare-text textarea", PROMPTS[0])
        page.click("#compare")
        read = "return document.querySelector(arguments[0])?.value"
        texts = [page.until(read, f"#{side}-answer textarea") for side in ("one", "other")]
        bare = engine.wait(engine.submit_generate("writer", PROMPTS[0], bare=True)).text
        assert texts == [engine.generate("writer", PROMPTS[0]).text, bare]
        page.picture(pictures / "compare.png")

        rows = tmp_path / "texts.txt"
        rows.write_text("\n".join(TEXTS), encoding="utf-8")
        page.click("button[role=tab]:nth-of-type(3)")
        page._session_request("POST", f"/element/{hidden(page, '#file input[type=file]')}/value", {"text": str(rows)})
        page.until("return document.querySelector('#file')?.textContent.includes('texts')")
        page.click("#file-ask")
        shown = page.until(
            f"const t = document.querySelector('#file-answers').innerText; return t.includes('{TEXTS[3]}') && t"
        )
        for answer in engine.classify("a", TEXTS).answers:
            assert answer["label"] in shown
        page.picture(pictures / "file.png")


def hidden(page: Browser, css: str) -> str:
    found = page._session_request("POST", "/elements", {"using": "css selector", "value": css})
    return next(iter(found[0].values()))


@pytest.mark.full
def test_the_page_requires_the_token(engine: Engine) -> None:
    app = build_app(engine, ServerState(TOKEN, ready=True), Metrics(), playground=True)
    with TestClient(app) as client:
        assert client.get("/v1/adapters").status_code == 401
        assert client.get(f"{PLAYGROUND}-other").status_code == 401
        asked = client.post(
            f"{PLAYGROUND}/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"}
        )
        assert asked.status_code == 401
        assert client.post(f"{PLAYGROUND}/login", data={"username": USER, "password": "wrong"}).status_code == 400
        assert client.post(f"{PLAYGROUND}/login", data={"username": USER, "password": TOKEN}).status_code == 200
    with TestClient(build_app(engine, ServerState(ready=True), Metrics())) as client:
        assert client.get(PLAYGROUND).status_code == 404, "the page is off by default"


def test_only_uploaded_files_are_read(address: str, tmp_path: Path) -> None:
    """The page names the file by its path, and so may anybody who sends the same request."""
    own, secret = tmp_path / "own.txt", tmp_path / "secret.txt"
    for file in (own, secret):
        file.write_text(f"{file.stem} text\n", encoding="utf-8")
    with httpx.Client(base_url=f"{address}{PLAYGROUND}", timeout=LIMIT) as client:
        assert client.post("/login", data={"username": USER, "password": TOKEN}).status_code == 200
        functions = {each["api_name"]: each["id"] for each in client.get("/config").json()["dependencies"]}

        def call(function: str, *data: Any) -> str:
            body = {"data": data, "fn_index": functions[function], "session_hash": "s"}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200
            return client.get("/gradio_api/queue/data", params={"session_hash": "s"}).text

        call("list_adapters")
        (uploaded,) = client.post("/gradio_api/upload", files={"files": (own.name, own.read_bytes())}).json()
        for path, read in ((uploaded, "own text"), (str(secret), "not uploaded")):
            found = call("ask_file", "a", {"path": path, "meta": {"_type": "gradio.FileData"}})
            assert read in found
            assert "secret text" not in found


def answered(parts: Any) -> list[Any]:
    return [part.value for part in parts]


def test_each_kind_of_adapter_shows_its_answer(engine: Engine) -> None:
    ask = Callbacks(engine).ask
    label, text = ask("pair", "It rained.", "It was dry.")
    assert label.visible
    assert not text.visible
    _, score = ask("score", "A man walks.", "A man is walking.")
    (wanted,) = engine.classify("score", [["A man walks.", "A man is walking."]]).answers
    assert score.value == f"{wanted['score']:.3f}"
    both = Callbacks(engine).compare("a", "a", TEXTS[1], "")
    assert both[0].value == both[2].value


def test_only_the_second_adapter_may_be_the_bare_base(engine: Engine) -> None:
    lists = Callbacks(engine).list_adapters()
    assert [[label for label, _ in each.choices] for each in lists] == [
        [*sorted(TASKS), *bare] for bare in ([], [], [BARE], [])
    ]
    assert {each.value for each in lists} == {"a"}


@pytest.mark.parametrize(
    ("adapter", "content", "message"),
    [
        ("a", b"\n \n", "one text per line"),
        ("a", b"caf\xe9", "byte 3 is not UTF-8"),
        ("a", b"1\n2\n3\n4\n5", "at most 4 lines, found 5"),
        ("pair", b"only one", "reads 2 texts"),
        ("gone", b"a text", "'gone' is no longer served"),
        (None, b"a text", "choose an adapter"),
    ],
)
def test_invalid_files_are_explained_on_the_page(
    engine: Engine, adapter: str | None, content: bytes, message: str, tmp_path: Path
) -> None:
    import gradio

    file = tmp_path / "rows.txt"
    file.write_bytes(content)
    with pytest.raises(gradio.Error) as shown:
        Callbacks(engine).ask_file(adapter, str(file))
    assert message in shown.value.message


def test_a_file_of_pairs(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("It rained.\tIt was dry.\nA man walks.\tA man moves.\n", encoding="utf-8")
    found = Callbacks(engine).ask_file("pair", str(file))
    assert found["headers"] == ["sentence1", "sentence2", "label", "probability"]
    pairs = [["It rained.", "It was dry."], ["A man walks.", "A man moves."]]
    assert [row[:2] for row in found["data"]] == pairs
    assert [row[2] for row in found["data"]] == [each["label"] for each in engine.classify("pair", pairs).answers]


def test_a_text_that_is_not_read_to_its_end_is_reported(engine: Engine) -> None:
    with pytest.warns(UserWarning, match="1 texts are longer than a reads"):
        Callbacks(engine).ask("a", "film " * 1000, "")


def test_only_generators_can_be_compared_with_their_base(engine: Engine) -> None:
    import gradio

    with pytest.raises(gradio.Error, match=r"a classifies, .* no trained head"):
        Callbacks(engine).compare("a", BARE, TEXTS[0], "")
