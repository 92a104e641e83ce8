"""What a server takes on, and how it refuses what is more."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lora_hf.core.errors import ConfigError, UserError


@dataclass(frozen=True)
class Limits:
    """The bounds of one server. Times are seconds.

    Raises:
        ConfigError: a bound that is not above zero, or more inputs than the queue can ever hold.
    """

    max_queue: int = 1024  # rows that wait for one base
    max_batch: int = 64  # rows of one batch
    max_tokens: int = 16384  # of one batch of a classifier
    max_inputs: int = 64  # of one request
    max_characters: int = 10_000  # of one text
    max_new_tokens: int = 256
    max_beams: int = 16
    max_bytes: int = 2_000_000  # of the body of one request
    deadline: float = 30.0  # of a request that asks for no shorter one

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) <= 0:
                raise ConfigError(f"{entry.name}: expected a number above 0, found {getattr(self, entry.name)}")
        if self.max_inputs > self.max_queue:
            raise ConfigError(
                f"max_inputs {self.max_inputs} is above max_queue {self.max_queue}: such a request would never find "
                "room; raise max_queue"
            )


class RefusalError(UserError):
    """A request that gets no answer; `code` is for programs, the message for people."""

    code = "refused"


class UnknownAdapterError(RefusalError):
    """No adapter of that name is served."""

    code = "unknown_adapter"


class WrongKindError(RefusalError):
    """The adapter classifies and was asked to write, or the other way round."""

    code = "wrong_kind"


class BadInputError(RefusalError):
    """An input that is empty, of the wrong form, or that the task cannot read."""

    code = "bad_input"


class TooLargeError(RefusalError):
    """More inputs, characters, tokens or beams than one request may have."""

    code = "too_large"


class QueueFullError(RefusalError):
    """As much waits as may wait; `retry_after` seconds from now there should be room."""

    code = "queue_full"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClosingError(RefusalError):
    """The engine answers what it has taken on, and takes on nothing more."""

    code = "closing"


class DeadlinePassedError(RefusalError):
    """The answer was not there in time."""

    code = "deadline_passed"
