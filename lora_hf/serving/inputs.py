"""Checks what clients send and encodes it for the model: rows of texts, prompts and decoding settings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from transformers import PreTrainedModel

from lora_hf.adapters.resolve import SavedModel
from lora_hf.core.config.fields import build_section
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import DataError, ModelError
from lora_hf.data.tasks.base import TRUNCATED, Task
from lora_hf.data.tasks.chat_template import Chat, ChatEncoder
from lora_hf.data.tasks.generation import TextGeneration
from lora_hf.data.tasks.user_texts import encode_texts as encode_user_texts
from lora_hf.inference.generate import prompt_limit, resolve_decoding, text_limit
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.models.align import check_tokens
from lora_hf.serving.limits import BadInputError, Limits, RefusalError, TooLargeError
from lora_hf.serving.requests import AdapterVersion
from lora_hf.serving.worker import Worker

# Below it sampling is greedy but for rounding, and logits divided by it may overflow. Clients send 1e-8 for 0.
LEAST_TEMPERATURE = 0.01
CHUNK = 16_384  # characters to tokenize at a time, so that a long request does not block short ones

Text = str | Sequence[str]  # one text, or the texts of a task that reads two
Message = Mapping[str, str]  # of a chat, with `role` and `content`
Prompt = str | Sequence[Message] | Sequence[int]


def check_rows(version: AdapterVersion, inputs: Sequence[Text], limits: Limits) -> dict[str, list[str]]:
    """The columns of the adapter's task.

    Raises:
        BadInputError, TooLargeError: no texts, too many, too long, or another number than the task reads.
    """
    names = version.saved.task.text_columns
    _check_count(inputs, limits)
    rows: list[list[str]] = [[row] if isinstance(row, str) else list(row) for row in inputs]
    for index, row in enumerate(rows):
        if len(row) != len(names):
            expected = "one text" if len(names) == 1 else f"{len(names)} texts"
            raise BadInputError(
                f"inputs[{index}]: {version.name} reads {expected} ({', '.join(names)}), found {len(row)}"
            )
        for text in row:
            check_text(text, f"inputs[{index}]", limits)
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def read_file(task: Task, name: str, content: bytes) -> list[list[str]]:
    """The texts of each row of a file, as `predict` and `generate` read it; its suffix tells the format.

    Raises:
        BadInputError: it cannot be read, or the task needs more than texts.
    """
    suffix = PurePath(name).suffix
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix if suffix[1:].isalnum() else ''}"
        path.write_bytes(content)
        try:
            if not isinstance(task, TextGeneration):
                columns = task.read_inputs(path)
                return [list(row) for row in zip(*(columns[name] for name in task.text_columns), strict=True)]
            if not task.reads_text:
                raise DataError(f"{path}: {task.name} reads more than texts; use generate on the command line")
            return [[prompt] for prompt, _ in task.read_prompts(path)]
        except DataError as error:
            raise BadInputError(str(error).replace(str(path), name)) from error


def _check_count(inputs: Sequence[Text], limits: Limits) -> None:
    if isinstance(inputs, str) or not inputs:
        raise BadInputError("inputs: expected a list with at least one text")
    if len(inputs) > limits.max_inputs:
        raise TooLargeError(f"inputs: expected at most {limits.max_inputs}, found {len(inputs)}; split the request")


def check_text(text: str, field: str, limits: Limits) -> None:
    """Raises a BadInputError or TooLargeError that begins with `field`."""
    if not isinstance(text, str) or not text.strip():
        raise BadInputError(f"{field}: expected a text, found an empty one")
    if len(text) > limits.max_characters:
        raise TooLargeError(f"{field}: expected at most {limits.max_characters} characters, found {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{field}: character {error.start} is an unpaired surrogate") from error


def encode_rows(
    version: AdapterVersion, worker: Worker, columns: Mapping[str, list[str]]
) -> tuple[dict[str, list], list[int]]:
    """What the task encodes of the rows, and the indices of the rows cut to the adapter's `max_length`."""
    task, rows = version.saved.task, len(next(iter(columns.values())))
    lengths = [sum(len(texts[row]) for texts in columns.values()) for row in range(rows)]
    limit = min(version.saved.max_length, worker.request_tokenizer.model_max_length)
    whole: dict[str, list] = {}
    start = 0
    while start < rows:
        stop = start + 1
        while stop < rows and sum(lengths[start : stop + 1]) <= CHUNK:
            stop += 1
        chunk = {name: texts[start:stop] for name, texts in columns.items()}
        with worker.tokenizer_lock, _refuse_bad_data():
            encoded = task.encode(chunk, worker.request_tokenizer, limit)
        for name, values in encoded.items():
            whole.setdefault(name, []).extend(values)
        start = stop
    _check_tokens(version, worker, whole["input_ids"])
    return whole, [row for row, truncated in enumerate(whole[TRUNCATED]) if truncated]


def _check_tokens(version: AdapterVersion, worker: Worker, ids: Sequence[list[int]]) -> None:
    with worker.tokenizer_lock, _refuse_bad_data():
        check_tokens(version.saved.task, ids, worker.request_tokenizer, worker.model)


@contextmanager
def _refuse_bad_data(prefix: str = "") -> Iterator[None]:
    """Raises a DataError as a BadInputError."""
    try:
        yield
    except DataError as error:
        raise BadInputError(f"{prefix}{error}") from error


def encode_texts(
    version: AdapterVersion, worker: Worker, texts: Sequence[str], limits: Limits
) -> list[dict[str, list[int]]]:
    """The model inputs of single texts, whatever the adapter's task reads.

    Raises:
        BadInputError, TooLargeError: no texts, too many, or too long.
    """
    _check_count(texts, limits)
    for index, text in enumerate(texts):
        check_text(text, f"inputs[{index}]", limits)
    tokenizer: Any = worker.request_tokenizer
    with worker.tokenizer_lock:
        encoded = encode_user_texts(tokenizer, list(texts), verbose=False)
    for index, ids in enumerate(encoded["input_ids"]):
        if len(ids) > tokenizer.model_max_length:
            raise BadInputError(
                f"inputs[{index}]: expected at most {tokenizer.model_max_length} tokens, found {len(ids)}; split it"
            )
    _check_tokens(version, worker, encoded["input_ids"])
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def can_embed(model: PreTrainedModel) -> bool:
    """Whether each token sees the whole text, so that the mean of all stands for it."""
    kind = model.config.model_type
    decodes = getattr(model.config, "is_decoder", False) or model.config.is_encoder_decoder
    return not (ARCHITECTURES[kind].causal if kind in ARCHITECTURES else decodes)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens.

    Attributes:
        clean: makes the client's text of a generated one.
        end_tokens: tokens that end the text besides those of the base.
        first_token: the token with which an encoder-decoder begins the text; None: as its base says.
        most: how many tokens the model can add.
    """

    tokens: list[int]
    clean: Callable[[str], str]
    end_tokens: tuple[int, ...]
    first_token: int | None
    most: int


def encode_prompt(
    version: AdapterVersion,
    worker: Worker,
    prompt: Prompt,
    settings: GenerateConfig,
    limits: Limits,
    raw: bool,
    fit: bool = False,
) -> EncodedPrompt:
    """Encodes a prompt that leaves space for the new tokens of `settings`; with `fit`, for one of them at least.

    A text is put into the form of the adapter's task, and so is the answer; with `raw`, for a bare base, both stay as
    they are. Chat messages go through the chat template of the adapter's task or of the tokenizer.

    Raises:
        BadInputError, TooLargeError: it is empty or too long, the task cannot read it, or there is no chat template.
    """
    task: TextGeneration = version.saved.task  # type: ignore[assignment]
    tokenizer: Any = worker.request_tokenizer
    limit = text_limit(worker.model, version.saved.max_length)
    least = replace(settings, max_new_tokens=1) if fit else settings
    room = prompt_limit(worker.model, limit, least)
    clean: Callable[[str], str] = str
    ends: list[int] = []
    tokens: list[Any]
    with worker.tokenizer_lock, _refuse_bad_data():
        if isinstance(prompt, str):
            check_text(prompt, "prompt", limits)
            if raw:
                tokens = tokenizer(prompt)["input_ids"]
            else:
                tokens = task.prompts([task.context(prompt)], tokenizer, room)[0]
                clean, ends = task.clean, task.end_tokens(tokenizer)
        elif prompt and isinstance(prompt[0], Mapping):
            tokens, ends = _encode_chat(version, tokenizer, prompt, limits, raw)  # type: ignore[arg-type]
        else:
            tokens = list(prompt)
            embeddings: Any = worker.model.get_input_embeddings()
            vocabulary = embeddings.num_embeddings
            if not tokens or not all(0 <= token < vocabulary for token in tokens):
                raise BadInputError(f"prompt: expected tokens from 0 to {vocabulary - 1}")
        check_tokens(task, [tokens], tokenizer, worker.model)
        first = None if raw else task.first_token(tokenizer)
    if len(tokens) > room:
        raise BadInputError(
            f"prompt: has {len(tokens)} tokens; the model reads at most {room} before {least.max_new_tokens} new "
            "ones. Shorten it, or ask for fewer new tokens",
            "context_length_exceeded",
        )
    most = settings.max_new_tokens if worker.model.config.is_encoder_decoder else limit - len(tokens)
    return EncodedPrompt(tokens, clean, tuple(ends), first, max(most, 1))


def has_template(version: AdapterVersion, worker: Worker) -> bool:
    """Whether the adapter can answer chat messages."""
    task, tokenizer = version.saved.task, worker.request_tokenizer
    return bool(getattr(task, "chat_template", None) or getattr(tokenizer, "chat_template", None))


def _encode_chat(
    version: AdapterVersion, tokenizer: Any, messages: Sequence[Message], limits: Limits, raw: bool
) -> tuple[list[int], list[int]]:
    """The tokens of a chat, and those that end a turn."""
    for index, message in enumerate(messages):
        check_text(message["content"], f"messages[{index}].content", limits)
    template = None if raw else getattr(version.saved.task, "chat_template", None)
    try:
        encoder = ChatEncoder(tokenizer, template, version.name)
    except ModelError as error:
        raise RefusalError(
            f"{version.name}: its base {version.base} has no chat template; use completions, or set a chat_template in "
            "the tokenizer_config.json of the base",
            "no_chat_template",
        ) from error
    with _refuse_bad_data("messages: "):  # a template refuses roles that it does not know, or their order
        return encoder.prompt(Chat([dict(message) for message in messages])), encoder.end_tokens()


def decoding_settings(
    saved: SavedModel, overrides: Mapping[str, Any], limits: Limits, model: PreTrainedModel
) -> GenerateConfig:
    """The settings of the adapter's run with those of the request.

    Raises:
        BadInputError, TooLargeError: a value is invalid or above a limit.
    """
    values = {key: value for key, value in overrides.items() if value is not None}
    temperature = values.get("temperature")
    if isinstance(temperature, int | float) and 0 <= temperature < LEAST_TEMPERATURE:
        values = {key: value for key, value in values.items() if key not in ("temperature", "top_p", "top_k")}
        values |= {"num_beams": 1, "do_sample": False}
    elif values.keys() & {"temperature", "top_p", "top_k"}:
        values = {"num_beams": 1, **values, "do_sample": True}
    _, problems = build_section(GenerateConfig, values)
    if problems:
        raise BadInputError("; ".join(problems))
    settings = resolve_decoding(saved.generate.override(**values, batch_size=1), model)
    if "max_new_tokens" not in values:
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, limits.max_new_tokens))
    for key, limit in (("max_new_tokens", limits.max_new_tokens), ("num_beams", limits.max_beams)):
        if getattr(settings, key) > limit:
            raise TooLargeError(f"{key}: expected at most {limit}, found {getattr(settings, key)}")
    if settings.do_sample and settings.num_beams > 1:
        raise BadInputError(f"num_beams: expected 1 with sampling, found {settings.num_beams}")
    return settings if settings.do_sample else replace(settings, seed=0, temperature=1.0, top_p=1.0, top_k=0)
