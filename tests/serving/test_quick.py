"""The quick way: what is right is answered on it, everything else reaches the framework as it was sent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.responses import JSONResponse

from lora_hf.serving.app import CLASSIFY
from lora_hf.serving.limits import BadInputError, Limits
from lora_hf.serving.quick import JSON, Quick
from lora_hf.serving.schema import bodies

RIGHT = b'{"adapter": "a", "inputs": ["a text"]}'


def ask(
    body: bytes = RIGHT, method: str = "POST", path: str = CLASSIFY, kind: bytes = JSON, error: Exception | None = None
) -> tuple[list[Any], list[bytes]]:
    """What is sent back, and the bodies that the framework was given."""
    sent: list[Any] = []
    passed: list[bytes] = []

    async def framework(_: Any, receive: Any, __: Any) -> None:
        passed.append((await receive())["body"])
        assert (await receive())["type"] == "http.disconnect"

    async def answer(asked: Any, _: Any) -> Any:
        if error is not None:
            raise error
        return {"adapter": asked.adapter, "texts": asked.inputs}

    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    quick = Quick(
        framework,
        CLASSIFY,
        bodies(Limits())[0],
        answer,
        lambda error: JSONResponse({"said": str(error)}, 422),
    )
    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", kind)]}
    asyncio.run(quick(scope, receive, send))
    return sent, passed


def test_a_right_request_is_answered_without_the_framework() -> None:
    (start, body), passed = ask()
    assert passed == []
    assert start["status"] == 200
    assert json.loads(body["body"]) == {"adapter": "a", "texts": ["a text"]}
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()


@pytest.mark.parametrize(
    "unusual",
    [
        {"body": b"{"},
        {"body": b'{"adapter": "a"}'},
        {"body": b'{"adapter": "a", "inputs": ["a text"], "more": 1}'},
        {"body": b""},
        {"method": "PUT"},
        {"path": "/v1/generate"},
        {"kind": b"application/json; charset=utf-8"},
        {"kind": b"text/plain"},
    ],
)
def test_what_is_unusual_reaches_the_framework_as_it_was_sent(unusual: dict[str, Any]) -> None:
    sent, passed = ask(**unusual)
    assert sent == []
    assert passed == [unusual.get("body", RIGHT)]


def test_a_refusal_is_told_and_a_fault_is_not_hidden() -> None:
    (start, body), passed = ask(error=BadInputError("inputs: nothing there"))
    assert (start["status"], json.loads(body["body"]), passed) == (422, {"said": "inputs: nothing there"}, [])
    with pytest.raises(RuntimeError, match="a fault"):
        ask(error=RuntimeError("a fault"))
