"""What the server's two processes send each other: JSON objects, each on one line."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

from lora_hf.core.errors import UserError
from lora_hf.serving.limits import RefusalError


def pack(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def receive(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """The messages that arrive, until the other end closes the connection."""
    with connection.makefile("rb", 1 << 16) as lines:
        yield from (json.loads(line) for line in lines if line.endswith(b"\n"))  # the last may be cut off


class InternalError(Exception):
    """A bug in the model's process, which has logged it."""


def describe_error(error: BaseException) -> dict[str, Any]:
    if isinstance(error, RefusalError):
        return {
            "kind": "refusal",
            "message": str(error),
            "code": error.code,
            "status": error.status,
            "retry_after": error.retry_after,
        }
    return {"kind": "user" if isinstance(error, UserError) else "internal", "message": str(error)}


def restore_error(description: dict[str, Any]) -> Exception:
    """An error like the one that was described, of one of three classes."""
    message = description["message"]
    if description["kind"] == "refusal":
        refusal = RefusalError(message, description["code"], description["status"])
        refusal.retry_after = description["retry_after"]
        return refusal
    return UserError(message) if description["kind"] == "user" else InternalError(message)
