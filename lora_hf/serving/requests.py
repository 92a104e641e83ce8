"""What goes through an engine: loaded adapter versions, requests for them, and their results."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from lora_hf.adapters.resolve import SavedModel
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import AdapterError
from lora_hf.serving.limits import DeadlinePassedError

if TYPE_CHECKING:
    import numpy as np


@dataclass(eq=False)
class AdapterVersion:
    """An adapter as loaded at one moment. The version that accepts a request answers it, even once it is replaced.

    Attributes:
        name: the name clients use.
        slot: its unique adapter name on the model.
        digest: the first 12 hexadecimal digits of a hash of its two files; answers report it as their version.
        pending: requests accepted but not yet answered.
        retired: replaced or removed; the worker unloads it once nothing is pending.
    """

    name: str
    slot: str
    digest: str
    saved: SavedModel
    pending: int = 0
    retired: bool = False

    @property
    def kind(self) -> str:
        """A `ModelKind`, such as `sequence-classification` or `causal-lm`."""
        return self.saved.task.model_kind

    @property
    def verb(self) -> str:
        """`predict` or `generate`."""
        return self.saved.task.verb


def digest_of(folder: Path) -> str:
    """Returns the first 12 hexadecimal digits of a hash of an adapter's two files.

    Raises:
        AdapterError: a file cannot be read.
    """
    sha256 = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise AdapterError(f"{folder / name}: cannot be read: {error.strerror}") from error
        sha256.update(f"{len(content)}:".encode())
        sha256.update(content)
    return sha256.hexdigest()[:12]


@dataclass(frozen=True)
class ClassifyResult:
    """For each input, in order, its answer, as of `Predictor.predict`, and what the task made of its logits.

    `truncated` are the indices of the inputs whose end the model did not read.
    """

    adapter: str
    version: str
    answers: list[dict[str, Any]]
    logits: list[Any]
    truncated: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class GenerateResult:
    """A text and its score, as `Generator.generate` yields them; `version` is None for the bare base."""

    adapter: str
    version: str | None
    text: str
    score: float


@dataclass(eq=False)
class Request:
    """A request for one adapter; `deadline` is on the clock of `time.monotonic`."""

    version: AdapterVersion
    deadline: float
    future: Future = field(default_factory=Future)

    @property
    def slot(self) -> str | None:
        """The adapter slot on the model that answers; None for the bare base."""
        return self.version.slot

    @property
    def waiting_rows(self) -> int:
        return 1

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the answer anymore."""
        return self.future.done() or time.monotonic() > self.deadline

    def finish(self, result: Any) -> None:
        with contextlib.suppress(InvalidStateError):  # the client is gone
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def expire(self) -> None:
        self.fail(DeadlinePassedError())


@dataclass(eq=False)
class ClassifyRequest(Request):
    """Tokenized rows to classify, possibly split across batches; the first `taken` inputs have left the queue.

    `encoded` is what the task encoded of `rows`; a long row may have several inputs.
    """

    rows: Mapping[str, list[str]] = field(default_factory=dict)
    encoded: Mapping[str, list] = field(default_factory=dict)
    inputs: list[dict[str, list[int]]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    taken: int = 0
    logits: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def waiting_rows(self) -> int:
        return len(self.inputs) - self.taken


@dataclass(eq=False)
class GenerateRequest(Request):
    """A tokenized prompt to continue.

    Attributes:
        bare: generate with the base alone, without the adapter.
        on_text: called with each new piece of text, in the engine's thread.
    """

    prompt: list[int] = field(default_factory=list)
    decoding: GenerateConfig = field(default_factory=GenerateConfig)
    bare: bool = False
    on_text: Callable[[str], None] | None = None

    @property
    def slot(self) -> str | None:
        return None if self.bare else self.version.slot
