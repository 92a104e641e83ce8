"""What goes through an engine: versions of adapters, requests for them, and their answers."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from lora_hf.adapters.resolve import SavedModel
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import AdapterError
from lora_hf.serving.limits import DeadlinePassedError, RefusalError

if TYPE_CHECKING:
    import numpy as np


@dataclass(eq=False)
class Version:
    """An adapter as it was loaded once. A request is answered by the version that it was accepted for, and by no other.

    Attributes:
        name: what clients call the adapter.
        slot: its name on the model, which no other version has.
        digest: twelve hexadecimal digits of a hash of its two files: what an answer names as its version.
        held: how many requests for it have no answer yet.
        retired: whether it was replaced or removed; it leaves the model when nothing holds it.
    """

    name: str
    slot: str
    digest: str
    saved: SavedModel
    held: int = 0
    retired: bool = False

    @property
    def kind(self) -> str:
        """`sequence-classification` or `causal-lm`."""
        return self.saved.task.model_kind


def digest_of(folder: Path) -> str:
    """Twelve hexadecimal digits of a hash of an adapter's two files.

    Raises:
        AdapterError: one cannot be read.
    """
    found = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise AdapterError(f"{folder / name}: cannot be read: {error.strerror}") from error
        found.update(f"{len(content)}:".encode())
        found.update(content)
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Classified:
    """The answers to the inputs of one request, in order: as `inference.described`; `logits` are `(num_labels,)`."""

    adapter: str
    version: str
    answers: list[dict[str, Any]]
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Written:
    """A text and its score, as `GeneratedText`. Without an adapter, `version` is that of the bare base: None."""

    adapter: str
    version: str | None
    text: str
    score: float


@dataclass(eq=False)
class Request:
    """Rows of one adapter that wait for their answer; `deadline` is a time of `time.monotonic`."""

    version: Version
    deadline: float
    future: Future = field(default_factory=Future)

    @property
    def slot(self) -> str | None:
        """The adapter on the model that answers; None is the bare base."""
        return self.version.slot

    @property
    def rows(self) -> int:
        """How many rows still wait."""
        return 1

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.future.done() or time.monotonic() > self.deadline

    def finish(self, answer: Any) -> None:
        """Hands the answer over, unless the client has gone."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Hands an error over, unless the client has gone."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def expire(self) -> None:
        """Says that the time is over."""
        self.fail(late())


def late() -> RefusalError:
    """The error of a request whose time is over."""
    return DeadlinePassedError(
        "the deadline passed before the answer was there; try again when the server has less to do"
    )


@dataclass(eq=False)
class Classify(Request):
    """Encoded rows to classify; they may be split over batches."""

    inputs: list[dict[str, list[int]]] = field(default_factory=list)
    taken: int = 0
    logits: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.inputs) - self.taken


@dataclass(eq=False)
class Write(Request):
    """A prompt, encoded, to write a text for.

    Attributes:
        bare: answered by the base without the adapter.
        on_text: is given each piece of the text as it is written, in the engine's thread.
    """

    prompt: list[int] = field(default_factory=list)
    decoding: GenerateConfig = field(default_factory=GenerateConfig)
    bare: bool = False
    on_text: Callable[[str], None] | None = None

    @property
    def slot(self) -> str | None:
        return None if self.bare else self.version.slot
