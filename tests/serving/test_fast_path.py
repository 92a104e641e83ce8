"""The fast path answers valid requests; everything else reaches the framework unchanged."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.responses import JSONResponse

from lora_hf.serving.app import CLASSIFY
from lora_hf.serving.limits import BadInputError, Limits
from lora_hf.serving.middleware import JSON, FastPathMiddleware
from lora_hf.serving.schema import bodies

VALID = b'{"adapter": "a", "inputs": ["a text"]}'


def ask(
    body: bytes = VALID,
    method: str = "POST",
    path: str = CLASSIFY,
    content_type: bytes = JSON.encode(),
    error: Exception | None = None,
) -> tuple[list[Any], list[bytes]]:
    """The messages sent back, and the bodies that reached the framework."""
    sent: list[Any] = []
    passed: list[bytes] = []

    async def framework(_: Any, receive: Any, __: Any) -> None:
        passed.append((await receive())["body"])
        assert (await receive())["type"] == "http.disconnect"

    async def answer(body: Any, _: Any) -> Any:
        if error is not None:
            raise error
        return {"adapter": body.adapter, "texts": body.inputs}

    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    fast_path = FastPathMiddleware(
        framework,
        CLASSIFY,
        bodies(Limits())[0],
        answer,
        lambda error: JSONResponse({"error": str(error)}, 422),
    )
    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", content_type)]}
    asyncio.run(fast_path(scope, receive, send))
    return sent, passed


def test_a_valid_request_is_answered_without_the_framework() -> None:
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
        {"content_type": b"application/json; charset=utf-8"},
        {"content_type": b"text/plain"},
    ],
)
def test_anything_unusual_reaches_the_framework_unchanged(unusual: dict[str, Any]) -> None:
    sent, passed = ask(**unusual)
    assert sent == []
    assert passed == [unusual.get("body", VALID)]


def test_refusals_are_sent_and_bugs_are_raised() -> None:
    (start, body), passed = ask(error=BadInputError("inputs: nothing there"))
    assert (start["status"], json.loads(body["body"]), passed) == (422, {"error": "inputs: nothing there"}, [])
    with pytest.raises(RuntimeError, match="a bug"):
        ask(error=RuntimeError("a bug"))
