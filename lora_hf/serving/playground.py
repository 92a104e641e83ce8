"""A web page on the server: ask one adapter, compare two, or ask for each line of a small file."""

from __future__ import annotations

import csv
import functools
import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
from fastapi import FastAPI
from gradio.themes import Base

from lora_hf.core.errors import UserError
from lora_hf.serving.engine import Engine
from lora_hf.serving.generate_worker import GenerateWorker
from lora_hf.serving.limits import BadInputError, RefusalError, TooLargeError
from lora_hf.serving.requests import AdapterVersion

BARE = "(the base without an adapter)"
KEEP_FILES = 3600  # seconds until an uploaded file is deleted
USER = "token"  # the user name of the login; the password is the server's token


def mount(app: FastAPI, engine: Engine, token: str | None, path: str) -> None:
    """Mounts the page; a server with a token asks for it at a login."""

    def authenticate(user: str, password: str) -> bool:
        assert token is not None
        return user == USER and hmac.compare_digest(password.encode(), token.encode())

    page = build(engine)
    page.has_launched = True  # only then does gradio check that a file it is to read was uploaded
    theme = Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gradio.mount_gradio_app(
        app,
        page,
        path=path,
        auth=None if token is None else authenticate,
        auth_message=None if token is None else f"User: {USER}. Password: the server's token.",
        theme=theme,
        footer_links=[],
        ssr_mode=False,
        max_file_size=engine.limits.max_bytes,
    )


def build(engine: Engine) -> Any:
    """Builds the page, a `gradio.Blocks`."""
    callbacks = Callbacks(engine)
    with gradio.Blocks(title="lora_hf", analytics_enabled=False, delete_cache=(KEEP_FILES, KEEP_FILES)) as page:
        gradio.Markdown("# lora_hf\nTry the adapters of this server.")
        with gradio.Tab("Ask"):
            adapter = gradio.Dropdown(label="Adapter", elem_id="ask-adapter")
            texts = _text_inputs("ask")
            button = gradio.Button("Ask", variant="primary", elem_id="ask")
            button.click(callbacks.ask, [adapter, *texts], [*_answer_outputs("Answer", "ask")])
        with gradio.Tab("Compare"):
            with gradio.Row():
                first = gradio.Dropdown(label="First adapter", elem_id="compare-one")
                second = gradio.Dropdown(label="Second adapter", elem_id="compare-other")
            texts = _text_inputs("compare")
            button = gradio.Button("Ask both", variant="primary", elem_id="compare")
            with gradio.Row():
                answers = [*_answer_outputs("First adapter", "one"), *_answer_outputs("Second adapter", "other")]
            button.click(callbacks.compare, [first, second, *texts], answers)
        with gradio.Tab("File"):
            chosen = gradio.Dropdown(label="Adapter", elem_id="file-adapter")
            formats = ".txt: one text per line. .csv or .tsv: one or two columns, without a header."
            file = gradio.File(label=formats, file_types=[".txt", ".csv", ".tsv"], elem_id="file")
            button = gradio.Button("Ask for each line", variant="primary", elem_id="file-ask")
            rows = gradio.Dataframe(label="Answers", interactive=False, wrap=True, elem_id="file-answers")
            button.click(callbacks.ask_file, [chosen, file], [rows])
        # Adapters come and go while the server runs, so the page lists them whenever it is opened.
        page.load(callbacks.list_adapters, None, [adapter, first, second, chosen])
    return page


def _text_inputs(tab: str) -> list[Any]:
    return [
        gradio.Textbox(label="Text or prompt", lines=3, elem_id=f"{tab}-text"),
        gradio.Textbox(label="Second text, if the adapter reads pairs", lines=2, elem_id=f"{tab}-second"),
    ]


def _answer_outputs(label: str, name: str) -> tuple[Any, Any]:
    """The outputs of an answer: probabilities, and a generated text or regression score."""
    return (
        gradio.Label(label=label, visible=False, elem_id=f"{name}-label"),
        gradio.Textbox(label=label, lines=4, interactive=False, elem_id=f"{name}-answer"),
    )


def _show_errors(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the engine's errors on the page."""

    @functools.wraps(callback)
    def wrapper(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except UserError as error:
            raise gradio.Error(str(error), title="Not answered", duration=None) from None

    return wrapper


class Callbacks:
    """What the page's buttons call."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def list_adapters(self) -> list[Any]:
        """The choices of the four adapter lists; generators can also be compared with their bare base."""
        versions = self.engine.adapters()
        names = [version.name for version in versions]
        bare = [BARE] if any(version.verb == GenerateWorker.verb for version in versions) else []
        choices = (names, names, [*names, *bare], names)
        return [gradio.Dropdown(choices=each, value=each[0] if each else None) for each in choices]

    @_show_errors
    def ask(self, adapter: str | None, text: str, second: str) -> tuple[Any, ...]:
        return self._answer(adapter, text, second)

    @_show_errors
    def compare(self, one: str | None, other: str | None, text: str, second: str) -> tuple[Any, ...]:
        bare = other == BARE
        return *self._answer(one, text, second), *self._answer(one if bare else other, text, second, bare)

    def _answer(self, adapter: str | None, text: str, second: str, bare: bool = False) -> tuple[Any, Any]:
        """The updates of the two outputs of an answer, one of which is hidden."""
        (answer,) = self._answers(self._version(adapter), [[text, second]], bare)
        if "probabilities" in answer:
            return gradio.Label(value=answer["probabilities"], visible=True), gradio.Textbox(visible=False)
        value = answer["text"] if "text" in answer else f"{answer['score']:.3f}"
        return gradio.Label(visible=False), gradio.Textbox(value=value, visible=True)

    @_show_errors
    def ask_file(self, adapter: str | None, file: str | None) -> dict[str, Any]:
        if file is None:
            raise BadInputError("choose a file with one text per line")
        version = self._version(adapter)
        lines = _read_lines(Path(file))
        if len(lines) > self.engine.limits.max_inputs:
            raise TooLargeError(f"file: expected at most {self.engine.limits.max_inputs} lines, found {len(lines)}")
        columns = ("prompt",) if version.verb == GenerateWorker.verb else version.saved.task.text_columns
        answers = self._answers(version, lines)
        for answer in answers:
            if "probabilities" in answer:
                answer["probability"] = round(max(answer.pop("probabilities").values()), 4)
            if "labels" in answer:
                answer["labels"] = ", ".join(answer["labels"])
        data = [[*line[: len(columns)], *answer.values()] for line, answer in zip(lines, answers, strict=True)]
        return {"headers": [*columns, *answers[0]], "data": data}

    def _answers(self, version: AdapterVersion, lines: list[list[str]], bare: bool = False) -> list[dict[str, Any]]:
        if version.verb == GenerateWorker.verb:
            requests = [self.engine.submit_generate(version.name, line[0], bare=bare) for line in lines]
            return [{"text": self.engine.wait(request).text} for request in requests]
        if bare:
            raise BadInputError(f"{version.name} classifies, and the bare base has no trained head; choose a generator")
        count = len(version.saved.task.text_columns)
        inputs = [line[:count] if count > 1 else line[0] for line in lines]
        result = self.engine.classify(version.name, inputs)
        if result.truncated:
            gradio.Warning(
                f"{len(result.truncated)} texts are longer than {version.name} reads; their ends were ignored"
            )
        return result.answers

    def _version(self, adapter: str | None) -> AdapterVersion:
        for version in self.engine.adapters():
            if version.name == adapter:
                return version
        raise RefusalError(f"{adapter!r} is no longer served; reload the page" if adapter else "choose an adapter")


def _read_lines(file: Path) -> list[list[str]]:
    """The texts of each line that is not empty.

    Raises:
        BadInputError: the file is not UTF-8, or is empty.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(f"file: byte {error.start} is not UTF-8; save it as UTF-8") from error
    if file.suffix == ".txt":
        lines = [[line] for line in text.splitlines() if line.strip()]
    else:
        delimiter = "\t" if file.suffix == ".tsv" else ","
        lines = [line for line in csv.reader(text.splitlines(), delimiter=delimiter) if any(map(str.strip, line))]
    if not lines:
        raise BadInputError("file: expected one text per line, found none")
    return lines
