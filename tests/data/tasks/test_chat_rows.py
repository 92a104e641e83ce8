"""Conversations from files: every form that people have, and every way in which a row can be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_hf.core.config.schema import RunConfig, TaskConfig
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.data.tasks.chat import ChatTask, self_contained
from lora_hf.data.tasks.chat_rows import from_json
from lora_hf.data.tasks.chat_template import Chat
from lora_hf.data.tasks.registry import task_of
from lora_hf.data.tokenization import encode
from tests.support.chats import CHATML, chat_tokenizer, taught_rows, write_rows

USER, REPLY = {"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Hello 🙂"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def task(**values: Any) -> ChatTask:
    made = task_of(TaskConfig("shop", kind="chat", **values))
    assert isinstance(made, ChatTask)
    return made


def chats(folder: Path, rows: list[Any], **values: Any) -> list[Chat]:
    write_rows(folder / "train.jsonl", rows)
    return [from_json(text) for text in task(**values).load(str(folder), ["train"])["train"]["messages"]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, REPLY]},
        {"messages": json.dumps([SYSTEM, USER, REPLY])},
        {"prompt": [SYSTEM, USER], "completion": [REPLY]},
        {"prompt": [SYSTEM, USER], "completion": REPLY["content"]},
        {"system": SYSTEM["content"], "prompt": USER["content"], "completion": REPLY["content"]},
        {"system": SYSTEM["content"], "conversations": [{"from": "human", "value": "Hi\nyou"}, REPLY]},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi\nyou"},
                {"from": "gpt", "value": "Hello 🙂"},
            ]
        },
        {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Hi\nyou"}]}, REPLY]},
        {"messages": [{**SYSTEM, "name": None}, USER, {**REPLY, "tool_calls": None}], "prompt": "ignored"},
    ],
)
def test_every_form_of_a_row(row: dict[str, Any], tmp_path: Path) -> None:
    assert chats(tmp_path, [row]) == [Chat([SYSTEM, USER, REPLY], None, (2,))]


def test_which_turns_are_trained(tmp_path: Path) -> None:
    both = [USER, REPLY, USER, REPLY]
    rows = [
        {"messages": both},
        {"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]},
        {"messages": [*both, USER]},
    ]
    assert [chat.trained for chat in chats(tmp_path, rows)] == [(1, 3), (3,), (1, 3)]
    assert [chat.trained for chat in chats(tmp_path, rows, train_on="last")] == [(3,), (3,), (3,)]
    (split,) = chats(tmp_path, [{"prompt": [USER, REPLY, USER], "completion": [REPLY, USER, REPLY]}])
    assert split.trained == (3, 5), "what the prompt holds is context"


def test_tools_and_calls(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "tool_calls": [CALL]}
    rows = [
        {"messages": [USER, call, {"role": "tool", "content": "2"}, REPLY], "tools": tools},
        {
            "conversations": [
                {"from": "human", "value": "Hi\nyou"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Hello 🙂"},
            ],
            "tools": json.dumps(tools),
        },
    ]
    (first,), (second,) = (chats(tmp_path, [row]) for row in rows)
    assert first.tools == second.tools == tools
    assert first.trained == second.trained == (1, 3)
    assert first.messages[1]["tool_calls"] == second.messages[1]["tool_calls"] == [CALL]
    assert second.messages[2] == {"role": "tool", "content": "2"}


def test_parquet_and_csv(tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, USER, REPLY]}, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    loaded = task().load(str(tmp_path), ["train"])["train"]
    assert [from_json(text).messages for text in loaded["messages"]] == [row["messages"] for row in rows]
    with (tmp_path / "validation.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([("question", "answer"), ("Hi\nyou", "Hello 🙂"), ("[1] or 2?", " 2\n")])
    answers = task(text_columns=("question",), label_column="answer").load(str(tmp_path), ["validation"])["validation"]
    assert [from_json(text).messages[1]["content"] for text in answers["messages"]] == ["Hello 🙂", " 2\n"]
    assert "row 1 (counting from 0)" in answers["origin"][1]


WRONG = [
    ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 1: expected a role of .*assistant.*found 'bot'"),
    ({"messages": [USER, {"content": "x"}]}, "message 1: expected the keys 'role' and 'content', found content"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 1: expected a text as 'content', found role"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1: expected a text as 'content', found 3"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]}, "text parts only, found image_url"),
    ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "message 1: expected a weight of 0 or 1, found 0.5"),
    ({"messages": ["hello", "you"]}, "message 0: expected an object .*found 'hello'"),
    ({"messages": []}, r"column 'messages': expected a list of messages, found \[\]"),
    ({"messages": "Hello"}, "column 'messages': expected a list of messages, found the text 'Hello'"),
    ({"messages": None}, "column 'messages': expected a list of messages, found nothing"),
    ({"messages": [SYSTEM, USER]}, "expected an assistant turn.*found none among the turns system, user"),
    ({"conversations": [{"from": "humn", "value": "x"}]}, r"'from' to be one of.*found 'humn' \(did you mean 'human'"),
    ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, r"the JSON of a call.*found 'f\(1\)'"),
    ({"prompt": "a", "completion": None}, "column 'completion': expected a list of messages, found nothing"),
    ({"prompt": "  ", "completion": "b"}, "column 'prompt': expected a text"),
    ({"messages": [USER, REPLY], "tools": "f"}, "column 'tools': expected a list of JSON schemas, found 'f'"),
]


@pytest.mark.parametrize(("row", "problem"), WRONG, ids=str)
def test_a_wrong_row(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"} if "prompt" in row else {next(iter(row)): [USER, REPLY]}
    with pytest.raises(DataError, match=rf"train.jsonl: 1 of 2 rows are wrong, the first is row 1 \(.*{problem}"):
        chats(tmp_path, [good, row])


DEEP = "[" * 2000 + "]" * 2000


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": f'[{{"role": {DEEP}}}]'}, "column 'messages': expected a list of messages"),
        ({"messages": [USER, REPLY], "tools": DEEP}, "column 'tools': expected a list of JSON schemas"),
        ({"messages": [USER, {"from": "function_call", "value": f'{{"name": "f", "arguments": {DEEP}}}'}]}, "a call"),
    ],
    ids=["messages", "tools", "a call"],
)
def test_json_in_a_text_that_is_too_deep(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"1 of 1 rows are wrong, the first is row 0 .*{problem}"):
        chats(tmp_path, [row])


def test_a_file_without_conversations(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"train\.jsonl: no column with conversations.*messages, conversations.*found: t"
    ):
        chats(tmp_path, [{"text": "a"}])
    with pytest.raises(DataError, match=r"expected 'dialog'; found: messages"):
        chats(tmp_path, [{"messages": [USER, REPLY]}], text_columns=("dialog",))
    with pytest.raises(
        DataError, match=r"no column 'completion' beside 'prompt'; found: prompt, response\..*label_col"
    ):
        chats(tmp_path, [{"prompt": "a", "response": "b"}])


def test_conversations_without_a_reply_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": [USER]}, {"messages": [USER, REPLY]}]
    assert len(chats(tmp_path, rows, drop_unlearnable=True)) == 1
    assert "left out 1 of 2 rows" in caplog.text


# Cutting to task.max_length


def long_rows(folder: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 200}, REPLY]}
    write_rows(folder / "train.jsonl", [{"messages": [USER, REPLY]}, long, long])


def test_rows_with_nothing_left_to_learn_are_refused(tmp_path: Path) -> None:
    long_rows(tmp_path)
    made = task()
    rows = made.load(str(tmp_path), ["train"])["train"]
    with pytest.raises(DataError, match="2 of 3 rows have no token to train on within 100 tokens") as error:
        encode(made, rows, chat_tokenizer(), 100, "train")
    assert f"the first is {tmp_path / 'train.jsonl'}: row 1 (counting from 0)" in str(error.value)
    assert "task.drop_unlearnable=true" in str(error.value)
    assert len(encode(made, rows, chat_tokenizer(), 300)) == 3


def test_or_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long_rows(tmp_path)
    made = task(drop_unlearnable=True)
    encoded = encode(made, made.load(str(tmp_path), ["train"])["train"], chat_tokenizer(), 100, "train")
    assert len(encoded) == 1
    assert "left out: 2 of 3 rows" in caplog.text
    with pytest.raises(DataError, match="3 of 3 rows"):
        encode(made, made.load(str(tmp_path), ["train"])["train"], chat_tokenizer(), 10, "train")


def test_a_long_conversation_keeps_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path / "train.jsonl", [{"messages": [SYSTEM, USER, REPLY, USER, REPLY]}])
    made, tokenizer = task(), chat_tokenizer()
    rows = made.load(str(tmp_path), ["train"])["train"]
    whole, cut = (encode(made, rows, tokenizer, length)["input_ids"][0] for length in (500, 60))
    assert cut == whole[:60]
    assert "truncated 1 of 1 rows" in caplog.text
    assert "the end of their conversations" in caplog.text


def test_special_tokens_in_texts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(
        tmp_path / "train.jsonl", [{"messages": [USER, REPLY]}, {"messages": [{**USER, "content": "</s>"}, REPLY]}]
    )
    made = task()
    encode(made, made.load(str(tmp_path), ["train"])["train"], chat_tokenizer(), 500)
    assert "1 of 2 conversations spell out special tokens (</s>)" in caplog.text
    assert "row 1 (counting from 0)" in caplog.text


def test_a_row_that_the_template_cannot_render_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"messages": [USER, REPLY]}, {"messages": [REPLY, USER, REPLY]}])
    made = task()
    with pytest.raises(DataError, match=r"train\.jsonl: row 1 \(counting from 0\): cannot find the assistant turns"):
        encode(made, made.load(str(tmp_path), ["train"])["train"], chat_tokenizer(), 500)


def test_messages_from_python_need_no_file() -> None:
    rows = Dataset.from_list(taught_rows(3))
    encoded = encode(task(), rows, chat_tokenizer(), 2000)
    assert len(encoded) == 3


def test_another_template_has_other_cached_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from lora_hf.data import tokenization

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tokenization, "MIN_CACHED_ROWS", 1)
    rows = Dataset.from_list(taught_rows(2))
    one, other = (encode(task(), rows, chat_tokenizer(each), 2000) for each in (CHATML, "{{ bos_token }}" + CHATML))
    assert len(other["input_ids"][0]) == len(one["input_ids"][0]) + 1


# Config


def test_the_config_holds_the_template_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}" + CHATML)
    config = self_contained(TaskConfig("shop", kind="chat", chat_template=str(file)))
    file.unlink()
    again = RunConfig.from_dict(RunConfig(task=config).to_dict()).task
    made, tokenizer = task_of(again), chat_tokenizer("other")
    assert made.prepare_tokenizer(tokenizer).chat_template == "{{ bos_token }}" + CHATML
    assert not caplog.text
    stopless = task(chat_template=CHATML.replace("<|im_end|>", ""))
    stopless.prepare_tokenizer(tokenizer)
    assert "does not learn to stop" in caplog.text


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            TaskConfig("shop", kind="chat", chat_template="nowhere.jinja"),
            r"task\.chat_template: expected chatml or a file",
        ),
        (TaskConfig("shop", kind="chat", label_names=("a", "b")), r"task\.label_names: task\.kind=chat has no classes"),
        (TaskConfig("shop", kind="chat", text_columns=("a", "b")), r"task\.text_columns: expected one column"),
        (TaskConfig("shop", kind="generation", train_on="last"), r"task\.train_on: only for task\.kind=chat"),
        (TaskConfig("sst2", chat_template="chatml"), "task.kind"),
    ],
)
def test_wrong_configs(config: TaskConfig, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        task_of(config)
