"""Chats: conversations through the model's chat template, trained on the assistant's turns only.

In a row of the task the column `messages` holds a conversation as JSON, because a table would give every message the
keys of all others; `origin` says where it comes from. A context is such a text as well.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.readers import read_texts
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.chat_rows import (
    MESSAGES,
    TrainOn,
    chat_of,
    from_json,
    read_chats,
    read_conversations,
    to_json,
)
from lora_hf.data.tasks.chat_template import Chat, ChatEncoder, read_template
from lora_hf.data.tasks.generation import Example, TextGeneration, causal_inputs, shown
from lora_hf.data.tasks.kind import Kind, check_no_classes
from lora_hf.data.tasks.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

ORIGIN = "origin"


@dataclass(frozen=True, kw_only=True)
class ChatTask(TextGeneration):
    """The next assistant turn of a conversation.

    `chat_template` is a template or a preset; None stands for the tokenizer's own.
    """

    train_on: TrainOn = "all"
    chat_template: str | None = None
    drop_unlearnable: bool = False

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
        """Returns what turns conversations into tokens.

        Raises:
            ModelError: there is no chat template.
        """
        return ChatEncoder(tokenizer, self.chat_template, self.name)

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Gives the tokenizer the task's template, so that a merged model brings it to other programs."""
        encoder = self.encoder(tokenizer)
        if self.chat_template is not None:
            tokenizer.chat_template = encoder.template
        if not encoder.end_tokens():
            _log.warning(
                "%s: the chat template ends an assistant turn without a special token, so the model does not learn to "
                "stop; write one there, such as {{ eos_token }}",
                self.name,
            )
        return tokenizer

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return self.encoder(tokenizer).end_tokens()

    # Rows

    check = Task.check  # the rows have been checked one by one when they were read

    def _example(self, *values: Any) -> Example:
        chat = self._chat(values[0])
        reference = chat.messages[chat.trained[-1]].get("content") or ""
        return Example(_context(chat), (reference,) if reference else ())

    def _chat(self, value: Any) -> Chat:
        """The conversation of a row: as this class writes it, or a list of messages from Python."""
        return from_json(value) if isinstance(value, str) else chat_of(value, self.train_on)

    def encode(self, rows: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Returns input_ids, attention_mask and labels; one entry for a row, or more (see `chat_template`).

        All but the trained turns has the label `IGNORE_INDEX`. An entry of more than `max_length` tokens loses its end.

        Raises:
            DataError: a conversation that the template cannot render.
        """
        encoder = self.encoder(tokenizer)
        entries = []
        for index, value in enumerate(rows[MESSAGES]):
            try:
                encoded = encoder.encode(self._chat(value))
            except (DataError, ValueError) as error:
                raise DataError(f"{_origin(rows, index)}: {error}") from error
            entries += [(ids[:max_length], labels[:max_length], len(ids) > max_length) for ids, labels in encoded]
        return causal_inputs(entries)

    def truncated_part(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return "the end of their conversations"

    def select_encoded(
        self, encoded: Dataset, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str = ""
    ) -> Dataset:
        """Refuses conversations of which `max_length` leaves no trained token, or leaves them out."""
        self._warn_special(rows, tokenizer, split)
        if len(encoded) > len(rows):
            _log.info(
                "%s: the chat template writes earlier turns differently once later ones follow: %d conversations "
                "became %d rows, each trained on the turns that it ends with",
                self.display_name(split), len(rows), len(encoded),
            )  # fmt: skip
        learnable = [any(label != IGNORE_INDEX for label in labels) for labels in encoded["labels"]]
        lost = learnable.count(False)
        if not lost:
            return encoded
        what = f"{lost} of {len(encoded)} rows have no token to train on within {max_length} tokens (task.max_length)"
        if not self.drop_unlearnable or lost == len(encoded):
            where = self._first_unlearnable(learnable, rows, tokenizer, max_length)
            raise DataError(
                f"{self.display_name(split)}: {what}: the assistant's turns come after the cut; the first is {where}. "
                "Set a greater task.max_length, shorten the conversations, or leave them out with "
                "task.drop_unlearnable=true"
            )
        _log.warning("%s: left out: %s", self.display_name(split), what)
        return encoded.select([index for index, kept in enumerate(learnable) if kept])

    def _first_unlearnable(
        self, learnable: Sequence[bool], rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> str:
        if len(learnable) == len(rows):
            return _origin(rows, learnable.index(False))
        for index in range(len(rows)):  # which conversation an entry belongs to is not kept
            labels = self.encode(rows[index : index + 1], tokenizer, max_length)["labels"]
            if any(all(label == IGNORE_INDEX for label in each) for each in labels):
                return _origin(rows, index)
        raise AssertionError("no such row")

    def _warn_special(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, split: str) -> None:
        encoder = self.encoder(tokenizer)
        found: Counter[str] = Counter()
        holding = []
        for index, value in enumerate(rows[MESSAGES]):
            if isinstance(value, str) and not encoder.pattern.search(value):
                continue
            if names := encoder.special_in(self._chat(value)):
                found.update(names)
                holding.append(index)
        if holding:
            _log.warning(
                "%s: %d of %d conversations spell out special tokens (%s), which are read as text and not as tokens; "
                "the first is %s",
                self.display_name(split), len(holding), len(rows), ", ".join(found), _origin(rows, holding[0]),
            )  # fmt: skip

    # Inference

    def context(self, prompt: str) -> str:
        """Returns the conversation that consists of one user turn."""
        if not prompt.strip():
            raise DataError(f"{self.name}: expected a prompt, found nothing")
        return self.conversation([{"role": "user", "content": prompt}])

    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        """Returns the context of messages, which `Generator.generate` continues with an assistant turn.

        Raises:
            DataError: a message is none.
        """
        try:
            return to_json(replace(chat_of(messages, tools=tools), trained=()))
        except ValueError as error:
            raise DataError(f"{self.name}: {error}") from error

    def read_prompts(self, path: Path) -> list[tuple[Any, str]]:
        """Returns the messages of each conversation of a file, and its context.

        A reply at the end is left out, so that files of training rows can be answered anew.
        """
        if path.suffix.lower() == ".txt":
            return [(text, self.context(text)) for text in read_texts(path, (self.text_columns[0],))[MESSAGES]]
        config = getattr(self.source, "config", None)
        chats = read_conversations(path, config.text_columns[0] if config else MESSAGES)
        asked = [chat.before(_without_replies(chat)) for chat in chats]
        answered = sum(len(before.messages) < len(chat.messages) for before, chat in zip(asked, chats, strict=True))
        if answered:
            _log.info("%s: %d of %d conversations end with a reply; generating another one", path, answered, len(chats))
        for index, chat in enumerate(asked):
            if not chat.messages:
                raise DataError(f"{path}: row {index} (counting from 0): expected a user turn, found replies only")
        return [(chat.messages, to_json(chat)) for chat in asked]

    def shown_context(self, context: str) -> list[dict[str, Any]]:
        return from_json(context).messages

    def prompts(self, contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
        """Returns the tokens to generate from: each conversation with the template's generation prompt.

        Raises:
            DataError: a conversation that the template cannot render, or one of more than `max_length` tokens.
            ModelError: there is no chat template.
        """
        encoder = self.encoder(tokenizer)
        prompts = []
        for index, context in enumerate(contexts):
            chat = from_json(context)
            try:
                prompt = encoder.prompt(chat)
            except DataError as error:
                raise DataError(f"{self.name}: conversation {index} (counting from 0): {error}") from error
            if len(prompt) > max_length:
                raise DataError(
                    f"{self.name}: conversation {index} (counting from 0) has {len(prompt)} tokens; the model reads at "
                    f"most {max_length} before it answers: {shown(chat.messages[-1].get('content'))}. Shorten it, or "
                    "set a smaller generate.max_new_tokens"
                )
            prompts.append(prompt)
        return prompts

    def clean(self, text: str) -> str:
        return text


def self_contained(config: TaskConfig) -> TaskConfig:
    """Returns the config with the template itself in place of its file, which the folder of a run does not hold.

    Raises:
        ConfigError: the file cannot be read.
    """
    return (
        config if config.chat_template is None else replace(config, chat_template=read_template(config.chat_template))
    )


def _origin(rows: Mapping[str, Any] | Dataset, index: int) -> str:
    names = getattr(rows, "column_names", rows)
    return rows[ORIGIN][index] if ORIGIN in names else f"row {index} (counting from 0)"


def _context(chat: Chat) -> str:
    """What stands before the last trained turn."""
    return to_json(chat.before(chat.trained[-1]))


def _without_replies(chat: Chat) -> int:
    """How many messages there are before the assistant's at the end."""
    count = len(chat.messages)
    while count and chat.messages[count - 1]["role"] == "assistant":
        count -= 1
    return count


def _check(config: TaskConfig) -> list[str]:
    problems = check_no_classes(config)
    if config.chat_template is not None:
        try:
            read_template(config.chat_template)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _build(config: TaskConfig, source: Source) -> Task:
    template = None if config.chat_template is None else read_template(config.chat_template)
    return ChatTask(
        name=config.name,
        source=source,
        text_columns=(MESSAGES,),
        metric="e2e_nlg",
        train_on=config.train_on,
        chat_template=template,
        drop_unlearnable=config.drop_unlearnable,
    )


def _read(config: TaskConfig, path: Path) -> Dataset:
    from datasets import Dataset

    column, completion = (config.text_columns or (MESSAGES,))[0], config.label_column or ""
    chats = read_chats(path, column, completion, config.train_on, config.drop_unlearnable)
    kept = [(index, chat) for index, chat in enumerate(chats) if chat is not None]
    if len(kept) < len(chats):
        _log.warning("%s: left out %d of %d rows without a turn to train on", path, len(chats) - len(kept), len(chats))
    texts = [to_json(chat) for _, chat in kept]
    return Dataset.from_dict({MESSAGES: texts, ORIGIN: [f"{path}: row {index} (counting from 0)" for index, _ in kept]})


CHAT = Kind(
    (MESSAGES,),
    "completion",
    (),
    _build,
    _check,
    max_texts=1,
    read=_read,
    inputs=lambda _, rows: [_context(from_json(text)) for text in rows[MESSAGES][:]],
    keys=("train_on", "chat_template", "drop_unlearnable"),
)
