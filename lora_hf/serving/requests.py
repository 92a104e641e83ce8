"""What goes through an engine: loaded adapter versions, requests for them, and their results."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from lora_hf.adapters.resolve import SavedModel
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import AdapterError
from lora_hf.models.model_ids import public_name
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
        chat: whether it can answer chat messages.
        embeds: whether it can embed texts.
        pending: requests accepted but not yet answered.
        retired: replaced or removed; the worker unloads it once nothing is pending.
    """

    name: str
    slot: str
    digest: str
    saved: SavedModel
    chat: bool = False
    embeds: bool = False
    pending: int = 0
    retired: bool = False

    @property
    def base(self) -> str:
        """The base as clients name it: never where the server keeps it."""
        return public_name(self.saved.model.name)


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


class Observer:
    """Gets called for each batch; this one ignores it."""

    def on_batch(self, base: str, rows: Sequence[str], answered: Sequence[str], tokens: int, seconds: float) -> None:
        """A batch has run.

        Args:
            rows: the adapter of each row.
            answered: the adapter of each row that was its last batch. A text takes a batch for each of its tokens.
            tokens: how many were read and generated.
        """


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
class Token:
    """A generated token with its log-probability, and the most probable tokens with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A new piece of a streamed text, and its tokens if the request asks for log-probabilities."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class GenerateResult:
    """A text and its score, as `Generator.generate` yields them; `version` is None for the bare base.

    `finish_reason` is `stop` (an end token or a stop string) or `length`. The counts are of tokens, end token included.
    """

    adapter: str
    version: str | None
    text: str
    score: float
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class EmbedResult:
    """A vector of length 1 for each input, `version` is None for the bare base."""

    adapter: str
    version: str | None
    vectors: list[list[float]]
    prompt_tokens: int


@dataclass(eq=False)
class Request:
    """A request for one adapter, or with `bare` for its base alone; `deadline` is on the clock of `time.monotonic`."""

    version: AdapterVersion
    deadline: float
    future: Future = field(default_factory=Future)
    bare: bool = False

    @property
    def slot(self) -> str | None:
        """The adapter slot on the model that answers; None for the bare base."""
        return None if self.bare else self.version.slot

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
class RowsRequest(Request):
    """Tokenized rows, possibly split across batches; the first `taken` have left the queue.

    Attributes:
        rows: the texts of each column.
        encoded: what the task encoded of them; a long row may have several inputs.
        outputs: the model's output for each input that has been run.
    """

    rows: Mapping[str, list[str]] = field(default_factory=dict)
    encoded: Mapping[str, list] = field(default_factory=dict)
    inputs: list[dict[str, list[int]]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    taken: int = 0
    outputs: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def waiting_rows(self) -> int:
        return len(self.inputs) - self.taken


class ClassifyRequest(RowsRequest):
    """Rows to classify; the outputs are logits."""


class EmbedRequest(RowsRequest):
    """Rows to embed; the outputs are the means of the last hidden states."""


@dataclass(eq=False)
class GenerateRequest(Request):
    """A tokenized prompt to continue.

    Attributes:
        on_text: called with each new `Piece` of text, in the engine's thread.
        stop: strings that end the text, which does not contain them.
        top_logprobs: how many of the most probable tokens to record at each position; None: no log-probabilities.
        clean: makes the text that the client gets of what the model wrote.
        end_tokens: tokens that end the text besides those of the base.
        first_token: the token with which an encoder-decoder begins the text; None: as its base says.
        streamed: what a text that runs whole has given to `on_text`.
    """

    prompt: list[int] = field(default_factory=list)
    decoding: GenerateConfig = field(default_factory=GenerateConfig)
    on_text: Callable[[Piece], None] | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    clean: Callable[[str], str] = str
    end_tokens: tuple[int, ...] = ()
    first_token: int | None = None
    streamed: str = ""
