"""Conversations as people have them in files: `messages`, `prompt` and `completion`, or ShareGPT's `conversations`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora_hf.core.errors import DataError, did_you_mean
from lora_hf.core.parsing import parse_json
from lora_hf.data.readers import read_objects
from lora_hf.data.tasks.chat_template import Chat, Message
from lora_hf.data.tasks.row_checks import check_any

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
OTHER_NAMES = ("conversations", "conversation", PROMPT)  # of the column `messages`, the first that a file has
ROLES = ("system", "developer", "user", "assistant", "tool")
SHARE_GPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",  # whose value is the call
}
TrainOn = Literal["all", "last"]
T = TypeVar("T")


def read_chats(path: Path, column: str, completion: str, train_on: TrainOn, drop: bool = False) -> list[Chat | None]:
    """Returns the conversation of each row of a file.

    Args:
        column: of the conversations, or of the prompts; `messages` stands for each of `OTHER_NAMES` as well.
        completion: the column of what is trained, where the prompts are in a column of their own.
        drop: return None for a conversation without a turn to train on, which is a wrong one otherwise.

    Raises:
        DataError: the first wrong row, with what was expected, what was found, and how many there are.
    """
    column, rows = _rows(path, column)
    has_completion = any(completion in row for row in rows)
    if column == PROMPT and not has_completion and all(isinstance(_unpacked(row.get(column)), str) for row in rows):
        raise DataError(
            f"{path}: no column {completion!r} beside {column!r}; found: {', '.join(rows[0])}. task.label_column names "
            "another one"
        )

    def read(row: Mapping[str, Any]) -> Chat | None:
        chat = _chat(row, column, completion if has_completion else None, train_on)
        if chat.trained or drop:
            return chat if chat.trained else None
        roles = ", ".join(message["role"] for message in chat.messages[:6])
        raise ValueError(
            f"column {column!r}: expected an assistant turn to train on, found none among the turns {roles}; leave the "
            "row out, or set task.drop_unlearnable=true"
        )

    return _read_all(path, rows, read)


def read_conversations(path: Path, column: str) -> list[Chat]:
    """Returns the conversations of a file to answer.

    Raises:
        DataError: as `read_chats`.
    """
    column, rows = _rows(path, column)
    return _read_all(path, rows, lambda row: _chat(row, column, None, "last"))


def _read_all(path: Path, rows: Sequence[dict[str, Any]], read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """Reads each row, or raises a DataError that counts the wrong ones and explains the first."""
    problems: dict[int, str] = {}

    def read_or_note(index: int) -> Any:
        try:
            return read(rows[index])
        except ValueError as error:
            problems[index] = str(error)

    chats = [read_or_note(index) for index in range(len(rows))]
    if problems:
        first = min(problems)
        raise DataError(
            f"{path}: {len(problems)} of {len(rows)} rows are wrong, the first is row {first} (counting from 0): "
            f"{problems[first]}"
        )
    return chats


def chat_of(value: Any, train_on: TrainOn = "last", tools: Any = None) -> Chat:
    """Returns the conversation of a list of messages.

    Raises:
        ValueError: a message is none, or the list is empty.
    """
    messages = _messages(value, "the conversation", "user")
    return Chat(messages, _tools(tools), _trained(messages, 0, train_on))


def to_json(chat: Chat) -> str:
    values: dict[str, Any] = {"messages": chat.messages}
    values |= {"tools": chat.tools} if chat.tools else {}
    return json.dumps(values | {"trained": chat.trained}, ensure_ascii=False)


def from_json(text: str) -> Chat:
    values = json.loads(text)
    return Chat(values["messages"], values.get("tools"), tuple(values["trained"]))


def _rows(path: Path, column: str) -> tuple[str, list[dict[str, Any]]]:
    """The name of the column of the conversations in the file, and its rows."""
    rows = read_objects(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    wanted = (MESSAGES, *OTHER_NAMES) if column == MESSAGES else (column,)
    found = next((name for name in wanted if name in names), None)
    check_any(rows, path)
    if found is None:
        expected = f"{', '.join(wanted[:2])}, or prompt and completion" if column == MESSAGES else repr(column)
        raise DataError(
            f"{path}: no column with conversations{did_you_mean(column, names)}; expected {expected}; found: "
            f"{', '.join(f'{name:.100}' for name in names[:50])}. task.text_columns names another one"
        )
    return found, rows


def _chat(row: Mapping[str, Any], column: str, completion: str | None, train_on: TrainOn) -> Chat:
    value = _unpacked(row.get(column))
    messages = _messages(value, f"column {column!r}", "user")
    start = 0
    if completion is not None and (column == PROMPT or isinstance(value, str)):
        start = len(messages)
        messages += _messages(_unpacked(row.get(completion)), f"column {completion!r}", "assistant")
    elif isinstance(value, str) and completion is None and column != PROMPT:
        raise ValueError(f"column {column!r}: expected a list of messages, found the text {value!r:.60}")
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages, start = [{"role": "system", "content": system}, *messages], start + bool(start)
    return Chat(messages, _tools(row.get("tools")), _trained(messages, start, train_on))


def _trained(messages: Sequence[Message], start: int, train_on: TrainOn) -> tuple[int, ...]:
    """The assistant turns from `start` on, except those that OpenAI's `weight: 0` leaves out; or the last of them."""
    turns = [
        index
        for index, message in enumerate(messages)
        if index >= start and message["role"] == "assistant" and message.get("weight", 1)
    ]
    return tuple(turns[-1:] if train_on == "last" else turns)


def _unpacked(value: Any) -> Any:
    """The value, or what its JSON says: tables without nested columns hold conversations as text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return parse_json(value, limit=None)
        except ValueError:
            return value
    return value


def _messages(value: Any, where: str, role: str) -> list[Message]:
    """The messages of a list, or of a text, which is one of `role`."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: expected a text or a list of messages, found {value!r}")
        return [{"role": role, "content": value}]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where}: expected a list of messages, found {_shown(value)}")
    return [_message(each, f"{where}, message {index}") for index, each in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(
            f'{where}: expected an object such as {{"role": "user", "content": ...}}, found {_shown(value)}'
        )
    message = {key: each for key, each in value.items() if each is not None}
    if "role" not in message and "from" in message:
        message = _from_share_gpt(message, where)
    if "role" not in message:
        raise ValueError(f"{where}: expected the keys 'role' and 'content', found {', '.join(message) or 'none'}")
    if message["role"] not in ROLES:
        raise ValueError(
            f"{where}: expected a role of {', '.join(ROLES)}, found {_shown(message['role'])}"
            f"{did_you_mean(str(message['role']), ROLES)}"
        )
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"{where}: expected a weight of 0 or 1, found {_shown(message['weight'])}")
    if "content" in message:
        message["content"] = _text(message["content"], where)
    elif message["role"] != "assistant" or not message.get("tool_calls"):
        raise ValueError(f"{where}: expected a text as 'content', found {', '.join(message)} only")
    return message


def _from_share_gpt(message: Message, where: str) -> Message:
    speaker, content = message["from"], message.get("value", message.get("content"))
    role = SHARE_GPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(
            f"{where}: expected 'from' to be one of {', '.join(SHARE_GPT_ROLES)}, found {_shown(speaker)}"
            f"{did_you_mean(str(speaker), SHARE_GPT_ROLES)}"
        )
    others = {key: each for key, each in message.items() if key not in ("from", "value", "content")}
    if speaker != "function_call":
        return {"role": role, **others} if content is None else {"role": role, "content": content, **others}
    try:
        call: Any = parse_json(content, limit=None) if isinstance(content, str) else content
        function = {"name": call["name"], "arguments": call.get("arguments", {})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where}: expected the JSON of a call such as {{"name": ..., "arguments": {{}}}}, found {_shown(content)}'
        ) from error
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": function}], **others}


def _text(content: Any, where: str) -> str:
    """The content as one text, also of a list of text parts, as OpenAI's API takes."""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if text is not None)
        others = {str(part.get("type")) for part in content} - {"text"}
        raise ValueError(
            f"{where}: expected text parts only, found {', '.join(sorted(others)) or 'a part without text'}"
        )
    raise ValueError(f"{where}: expected a text as 'content', found {_shown(content)}")


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value, limit=None)
        except ValueError as error:
            raise ValueError(f"column 'tools': expected a list of JSON schemas, found {value!r:.60}") from error
    if not value:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError(f"column 'tools': expected a list of JSON schemas, found {_shown(value)}")
    return [dict(tool) for tool in value]


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
