"""A page on the server: an adapter and a text, and its answer; two adapters side by side; a small file at once."""

from __future__ import annotations

import csv
import hmac
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.errors import UserError
from lora_hf.serving.limits import BadInputError, RefusalError, TooLargeError
from lora_hf.serving.writing import Writer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lora_hf.serving.engine import Engine

PATH = "/playground"
BARE = "(the base without an adapter)"
USER = "token"  # of the login, where the server has a token: that is its password


def mount(app: FastAPI, engine: Engine, token: str | None) -> None:
    """Puts the page under `PATH` of the application; with a token, behind a login whose password it is."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported: nothing is sent anywhere
    import gradio
    from gradio.themes import Base

    def knows(user: str, password: str) -> bool:
        assert token is not None
        return user == USER and hmac.compare_digest(password.encode(), token.encode())

    theme = Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gradio.mount_gradio_app(
        app,
        build(engine),
        path=PATH,
        auth=None if token is None else knows,
        auth_message=None if token is None else f"User: {USER}. Password: the server's token.",
        theme=theme,
        footer_links=[],
        ssr_mode=False,
        max_file_size=engine.limits.max_bytes,
    )


def build(engine: Engine) -> Any:
    """The page itself, a `gradio.Blocks`."""
    import gradio

    with gradio.Blocks(title="lora_hf", analytics_enabled=False) as page:
        gradio.Markdown("# lora_hf\nEvery adapter of one base, asked from one page.")
        choices: list[Any] = []
        with gradio.Tab("Ask"):
            adapter = gradio.Dropdown(label="Adapter", elem_id="ask-adapter")
            texts = _texts(gradio, "ask")
            button = gradio.Button("Ask", variant="primary", elem_id="ask")
            label, text = _answer(gradio, "Answer", "ask")
            button.click(_asked(engine), [adapter, *texts], [label, text])
            choices.append((adapter, False))
        with gradio.Tab("Compare"):
            with gradio.Row():
                first = gradio.Dropdown(label="One", elem_id="compare-one")
                second = gradio.Dropdown(label="The other", elem_id="compare-other")
            texts = _texts(gradio, "compare")
            button = gradio.Button("Ask both", variant="primary", elem_id="compare")
            with gradio.Row():
                answers = [*_answer(gradio, "One", "one"), *_answer(gradio, "The other", "other")]
            button.click(_compared(engine), [first, second, *texts], answers)
            choices += [(first, False), (second, True)]
        with gradio.Tab("File"):
            chosen = gradio.Dropdown(label="Adapter", elem_id="file-adapter")
            kinds = ".txt: a text a line. .csv or .tsv: one or two columns, without a header."
            file = gradio.File(label=kinds, file_types=[".txt", ".csv", ".tsv"], elem_id="file")
            button = gradio.Button("Ask for each line", variant="primary", elem_id="file-ask")
            rows = gradio.Dataframe(label="Answers", interactive=False, wrap=True, elem_id="file-answers")
            button.click(_of_file(engine), [chosen, file], [rows])
            choices.append((chosen, False))
        # Adapters come and go while the server runs: they are listed when the page is opened.
        page.load(_listed(engine, [bare for _, bare in choices]), None, [each for each, _ in choices])
    return page


def _texts(gradio: Any, place: str) -> list[Any]:
    return [
        gradio.Textbox(label="Text, or prompt", lines=3, elem_id=f"{place}-text"),
        gradio.Textbox(label="Second text, where the adapter reads a pair", lines=2, elem_id=f"{place}-second"),
    ]


def _answer(gradio: Any, name: str, place: str) -> tuple[Any, Any]:
    """Where an answer appears: probabilities of a classifier, and the text of a writer or the score of a regression."""
    return (
        gradio.Label(label=name, visible=False, elem_id=f"{place}-label"),
        gradio.Textbox(label=name, lines=4, interactive=False, elem_id=f"{place}-answer"),
    )


def _listed(engine: Engine, bare: Sequence[bool]) -> Callable[[], Any]:
    def listed() -> Any:
        import gradio

        versions = engine.adapters()
        names = [version.name for version in versions]
        writes = any(version.kind == Writer.kind for version in versions)
        of_all = [[*names, BARE] if each and writes else names for each in bare]
        updates = [gradio.Dropdown(choices=of_one, value=of_one[0] if of_one else None) for of_one in of_all]
        return updates if len(updates) > 1 else updates[0]

    return listed


def _asked(engine: Engine) -> Callable[..., Any]:
    def asked(adapter: str | None, text: str, second: str) -> Any:
        return _told(lambda: _one(engine, adapter, text, second))

    return asked


def _compared(engine: Engine) -> Callable[..., Any]:
    def compared(one: str | None, other: str | None, text: str, second: str) -> Any:
        if other == BARE:
            return _told(lambda: (*_one(engine, one, text, second), *_one(engine, one, text, second, bare=True)))
        return _told(lambda: (*_one(engine, one, text, second), *_one(engine, other, text, second)))

    return compared


def _of_file(engine: Engine) -> Callable[..., Any]:
    def of_file(adapter: str | None, file: str | None) -> Any:
        return _told(lambda: _rows(engine, adapter, file))

    return of_file


def _told(answer: Callable[[], Any]) -> Any:
    """A mistake is shown on the page, in the words that HTTP gives it."""
    import gradio

    try:
        return answer()
    except UserError as error:
        raise gradio.Error(str(error), title="Not answered", duration=None) from None


def _one(engine: Engine, adapter: str | None, text: str, second: str, bare: bool = False) -> tuple[Any, Any]:
    """What the two parts of an answer show: one of them is hidden."""
    import gradio

    version = _version(engine, adapter)
    if version.kind == Writer.kind:
        request = engine.submit_generate(version.name, text, bare=bare)
        return gradio.Label(visible=False), gradio.Textbox(value=engine.wait(request).text, visible=True)
    if bare:
        raise BadInputError(f"{version.name} classifies, and the base alone has no head for it; choose a writer")
    answer = engine.classify(version.name, [_input(version, [text, second])]).answers[0]
    if "probabilities" not in answer:
        return gradio.Label(visible=False), gradio.Textbox(value=f"{answer['score']:.3f}", visible=True)
    return gradio.Label(value=answer["probabilities"], visible=True), gradio.Textbox(visible=False)


def _rows(engine: Engine, adapter: str | None, file: str | None) -> Any:
    if file is None:
        raise BadInputError("file: expected one, found none; choose a file with a text in each line")
    version = _version(engine, adapter)
    lines = _lines(Path(file))
    if len(lines) > engine.limits.max_inputs:
        raise TooLargeError(f"file: expected at most {engine.limits.max_inputs} lines, found {len(lines)}")
    if version.kind == Writer.kind:
        requests = [engine.submit_generate(version.name, line[0]) for line in lines]
        found = [[*line, engine.wait(request).text] for line, request in zip(lines, requests, strict=True)]
        return {"headers": ["prompt", "text"], "data": found}
    answers = engine.classify(version.name, [_input(version, line) for line in lines]).answers
    columns = version.saved.task.text_columns
    found = [
        [*line[: len(columns)], answer.get("label", answer.get("score"))]
        + ([round(max(answer["probabilities"].values()), 4)] if "probabilities" in answer else [])
        for line, answer in zip(lines, answers, strict=True)
    ]
    last = ["label", "probability"] if found and len(found[0]) > len(columns) + 1 else ["score"]
    return {"headers": [*columns, *last], "data": found}


def _lines(file: Path) -> list[list[str]]:
    """The texts of each line that has any.

    Raises:
        BadInputError: not UTF-8, or nothing in it.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(f"file: byte {error.start} is no UTF-8; save it as UTF-8") from error
    if file.suffix == ".txt":
        lines = [[line] for line in text.splitlines() if line.strip()]
    else:
        delimiter = "\t" if file.suffix == ".tsv" else ","
        lines = [line for line in csv.reader(text.splitlines(), delimiter=delimiter) if any(map(str.strip, line))]
    if not lines:
        raise BadInputError("file: expected a text in each line, found none")
    return lines


def _version(engine: Engine, adapter: str | None) -> Any:
    found = next((version for version in engine.adapters() if version.name == adapter), None)
    if found is None:
        raise RefusalError(
            f"{adapter!r} is not served any more; open the page anew" if adapter else "choose an adapter"
        )
    return found


def _input(version: Any, texts: Sequence[str]) -> str | list[str]:
    columns = version.saved.task.text_columns
    return list(texts[: len(columns)]) if len(columns) > 1 else texts[0]
