"""What the server's two processes send each other: JSON objects, each after its length in bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from lora_hf.core.errors import UserError
from lora_hf.serving.limits import RefusalError

LENGTH = struct.Struct("!I")


def pack(message: dict[str, Any]) -> bytes:
    content = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(content)) + content


class Unpacker:
    """Splits what has arrived into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            content = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield json.loads(content)


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
