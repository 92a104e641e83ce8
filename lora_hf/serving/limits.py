"""The limits of a server, and the errors it refuses requests with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lora_hf.core.errors import ConfigError, UserError


@dataclass(frozen=True)
class Limits:
    """The limits of one server. Times are in seconds.

    Raises:
        ConfigError: a limit is not positive, or one request may hold more inputs than the queue.
    """

    max_queue: int = 1024  # rows waiting for one base
    max_batch: int = 64  # rows per batch
    max_tokens: int = 16384  # per batch; of texts that are being generated, with those still to come
    max_inputs: int = 64  # per request
    max_characters: int = 10_000  # per text
    max_new_tokens: int = 256
    max_beams: int = 16
    max_choices: int = 16  # texts for one prompt
    max_bytes: int = 2_000_000  # per request body
    deadline: float = 30.0  # the longest that a request may ask for, and its default
    max_connections: int = 1000
    max_header_bytes: int = 65_536  # per request, its first line included
    header_seconds: float = 10.0  # until a request's header has arrived
    body_seconds: float = 30.0  # until its body has arrived, and for the client to read an answer

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) <= 0:
                raise ConfigError(f"{entry.name}: expected a number above 0, found {getattr(self, entry.name)}")
        if self.max_inputs > self.max_queue:
            raise ConfigError(
                f"max_queue: expected at least max_inputs, {self.max_inputs}, found {self.max_queue}: a full request "
                "would never fit; raise max_queue"
            )


def error_body(code: str, message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of every error response, in OpenAI's form. `param` is the field of the request with the error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class RefusalError(UserError):
    """A request that gets no answer; `code` is for programs, the message for people, `status` for HTTP."""

    code, status = "refused", 400
    retry_after = 1  # seconds; sent with status 503

    def __init__(self, message: str, code: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status = code or self.code, status or self.status


class UnknownAdapterError(RefusalError):
    code, status = "unknown_adapter", 404


class WrongKindError(RefusalError):
    """A classifier was asked to generate, or a generator to classify."""

    code = "wrong_kind"


class BadInputError(RefusalError):
    code, status = "bad_input", 422


class TooLargeError(RefusalError):
    """More inputs, characters, tokens or beams than one request may have."""

    code, status = "too_large", 413


class QueueFullError(RefusalError):
    code, status = "queue_full", 503

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosingError(RefusalError):
    """The engine answers the requests it has accepted and takes no new ones."""

    code, status = "closing", 503


class DeadlinePassedError(RefusalError):
    code, status = "deadline_passed", 504

    def __init__(self) -> None:
        super().__init__("the deadline passed before the answer was ready; retry when the server is less busy")
