"""The page in a real browser: a chat, two classifiers side by side, a file, and a server with a token."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from lora_hf.serving.app import ServerState
from lora_hf.serving.engine import Engine
from lora_hf.serving.limits import Limits
from tests.support.browser import Browser, browser, missing
from tests.support.chat_models import save_chat_model, save_random_on
from tests.support.engine_client import ThreadClient, app_of
from tests.support.random_adapters import PROMPTS, TEXTS, save_random
from tests.support.waiting import LIMIT, wait_until

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}")

TOKEN = "a-token-of-this-test"
NEW = 16  # tokens
READY = "return document.querySelector('#send').textContent === 'Send'"
BOXES = "return [...document.querySelectorAll('#texts label')].map(each => each.firstChild.textContent)"
CHOOSE = "const box = document.querySelector(arguments[0]); box.value = arguments[1]; box.onchange && box.onchange()"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("adapters")
    base = save_chat_model(root / "tiny-chat")
    with Engine(Limits(max_new_tokens=NEW, deadline=LIMIT), exact=True) as engine:
        engine.load("assistant", save_random_on(base, root / "assistant", "rule-restaurants", 1))
        for seed, (name, task) in enumerate(
            {"a": "rule-sentiment", "b": "rule-sentiment", "pair": "rte", "writer": "rule-restaurants"}.items()
        ):
            engine.load(name, save_random(root / name, task, seed))
        yield engine


@pytest.fixture(scope="module")
def page(engine: Engine) -> Iterator[Browser]:
    server = uvicorn.Server(
        uvicorn.Config(app_of(ThreadClient(engine), ServerState(TOKEN, ready=True)), port=0, log_config=None)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    with browser() as page:
        page.open(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/")
        for token, message in (("", "Enter the token"), ("wrong", "another token")):
            page.type("#token", f"{token}\ue007")
            page.until("return document.querySelector('#log').innerText.includes(arguments[0])", message)
            assert page.run("return getComputedStyle(document.querySelector('#form')).display") == "none"
            page.run("document.querySelector('#token').value = ''")
        page.type("#token", f"{TOKEN}\ue007")
        page.until("return document.querySelector('#adapter').options.length === 5")
        yield page
    server.should_exit = True
    thread.join()


def picture(page: Browser, name: str, tmp_path: Path) -> None:
    page.picture(Path(os.environ.get("LORA_HF_PICTURES", tmp_path)) / f"{name}.png")


def test_a_chat_keeps_its_turns(page: Browser, engine: Engine, tmp_path: Path) -> None:
    page.run(CHOOSE, "#adapter", "assistant")
    messages: list[dict[str, str]] = []
    for turn, text in enumerate(("A pub?", "Another one?")):
        messages.append({"role": "user", "content": text})
        wanted = engine.generate("assistant", messages, temperature=0, max_new_tokens=NEW).text  # type: ignore[arg-type]
        messages.append({"role": "assistant", "content": wanted})
        page.type("#texts textarea", f"{text}\ue007")
        count = f"document.querySelectorAll('.turn').length === {2 * turn + 2}"
        page.until(f"{READY} && {count}")
        shown = page.run("return [...document.querySelectorAll('.turn')].map(each => each.textContent)")
        assert shown == [each["content"] for each in messages]
    picture(page, "chat", tmp_path)


def test_a_form_has_a_box_for_each_text(page: Browser, engine: Engine, tmp_path: Path) -> None:
    page.run(CHOOSE, "#adapter", "pair")
    assert page.run(BOXES) == ["sentence1", "sentence2"]
    page.run(CHOOSE, "#adapter", "a")
    assert page.run(BOXES) == ["sentence"]
    page.run(CHOOSE, "#other", "b")
    page.type("#texts textarea", TEXTS[0])
    page.click("#send")
    page.until(f"{READY} && document.querySelectorAll('.answer').length === 2")
    shown = page.run("return [...document.querySelectorAll('.answer')].map(each => each.innerText)")
    for name, text in zip("ab", shown, strict=True):
        answer = engine.classify(name, TEXTS[:1]).answers[0]
        assert answer["label"] in text.splitlines()[1]
        assert f"{100 * max(answer['probabilities'].values()):.1f}%" in text
    picture(page, "form", tmp_path)


def test_a_generator_is_compared_with_its_base(page: Browser, engine: Engine) -> None:
    page.run(CHOOSE, "#adapter", "writer")
    page.run(CHOOSE, "#other", "tiny-gpt2 (the base alone)")
    page.type("#texts textarea", PROMPTS[0])
    page.click("#send")
    page.until(f"{READY} && document.querySelectorAll('.answer').length === 2")
    shown = page.run("return [...document.querySelectorAll('.answer > div')].map(each => each.textContent)")
    wanted = [engine.generate(name, PROMPTS[0], temperature=0, max_new_tokens=NEW) for name in ("writer", "tiny-gpt2")]
    assert shown == [each.text for each in wanted]


def test_each_line_of_a_file_is_classified(page: Browser, engine: Engine, tmp_path: Path) -> None:
    rows = tmp_path / "texts.txt"
    rows.write_text("\n".join(TEXTS), encoding="utf-8")
    page.run(CHOOSE, "#adapter", "a")
    page._session_request("POST", f"/element/{page.find('#file')}/value", {"text": str(rows)})
    page.click("#send")
    page.until(f"{READY} && document.querySelectorAll('td').length === {2 * len(TEXTS)}")
    shown = page.run("return [...document.querySelectorAll('td')].map(each => each.textContent)")
    assert shown[::2] == list(TEXTS)
    labels = [answer["label"] for answer in engine.classify("a", TEXTS).answers]
    assert [text.split()[0] for text in shown[1::2]] == labels


def test_spans_are_marked_in_their_text(page: Browser) -> None:
    """Offsets count characters as Python does, of which JavaScript counts some twice."""
    span = {"start": 2, "end": 6, "type": "PER", "score": 0.987}
    for answer in ({"spans": [span]}, {"answer": "Anna", **span}):
        page.run("document.querySelector('#log').replaceChildren()")
        text = "\N{GRINNING FACE} Anna left."
        page.run("show(arguments[0], document.querySelector('#log'), arguments[1])", answer, text)
        kind = "PER" if "spans" in answer else "answer"
        assert page.text("#log .marked") == f"\N{GRINNING FACE} Anna{kind} 98.7% left."
        assert page.text("#log mark") == f"Anna{kind} 98.7%"


def test_an_error_is_shown(page: Browser) -> None:
    page.run(CHOOSE, "#adapter", "writer")
    page.type("#texts textarea", "name[A], eatTipe[pub]")
    page.click("#send")
    page.until(f"{READY} && document.querySelectorAll('.error').length === 1")
    assert "did you mean 'eatType'" in page.text(".error")
