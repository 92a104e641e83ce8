"""Which tokens of a conversation are trained, through templates of every sort."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lora_hf.core.errors import ConfigError, DataError, ModelError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.tasks.chat_rows import chat_of
from lora_hf.data.tasks.chat_template import Chat, ChatEncoder, read_template
from lora_hf.training.run import padding_collator
from tests.support.chats import CHATML, FORGETFUL, chat_tokenizer, taught_rows
from tests.support.small_models import small_model

MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}",
)
# As Phi-3's: a token closes every conversation, also one that goes on.
CLOSING = CHATML + "{% if not add_generation_prompt %}{{ '</s>' }}{% endif %}"
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson + '\n' }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWO = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Xin chào\n\nbạn 🙂"},
    {"role": "assistant", "content": "\n\nChào\tbạn!\n"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "ok"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Huế"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def encoder(template: str | None = None, own: str | None = CHATML, **values: Any) -> ChatEncoder:
    return ChatEncoder(chat_tokenizer(own, **values), template, "shop")


def trained(made: ChatEncoder, chat: Chat) -> list[list[str]]:
    """Of each row the texts that have a loss, one for each run of tokens."""
    rows = []
    for ids, labels in made.encode(chat):
        assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
        runs = itertools.groupby(labels, key=lambda label: label != IGNORE_INDEX)
        rows.append([made.tokenizer.decode([*run]) for learns, run in runs if learns])
    return rows


def test_every_assistant_turn_with_its_end_and_line_breaks() -> None:
    made = encoder()
    ((ids, _),) = made.encode(chat_of(TWO, "all"))
    assert made.tokenizer.decode(ids) == made.tokenizer.apply_chat_template(TWO, tokenize=False)
    assert trained(made, chat_of(TWO, "all")) == [["\n\nChào\tbạn!\n<|im_end|>\n", "ok<|im_end|>\n"]]
    assert trained(made, chat_of(TWO, "last")) == [["ok<|im_end|>\n"]]


def test_the_row_begins_with_the_prompt_of_generation() -> None:
    """Also where a line break of the reply would merge with that of the prompt."""
    made, chat = encoder(), chat_of(TWO, "all")
    ((ids, labels),) = made.encode(chat)
    prompt = made.prompt(chat.before(2))
    assert ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORE_INDEX}
    assert labels[len(prompt)] == ids[len(prompt)]


def test_every_turn_of_many_conversations() -> None:
    made = encoder()
    for row in taught_rows(30):
        replies = [f"{each['content']}<|im_end|>\n" for each in row["messages"] if each["role"] == "assistant"]
        assert trained(made, chat_of(row["messages"], "all")) == [replies]


def test_a_padded_batch_still_trains_the_end_token_that_pads_it() -> None:
    made = encoder()
    rows = [made.encode(chat_of(each, "all"))[0] for each in (TWO, TWO[1:3])]
    batch = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels in rows]
    collate = padding_collator(small_model("llama", vocab_size=300), made.tokenizer, "causal-lm")
    padded = collate(batch)
    end = made.tokenizer.pad_token_id
    assert end == made.tokenizer.eos_token_id
    assert (padded["labels"] == end).sum(1).tolist() == [2, 1]
    assert torch.equal(padded["labels"] == end, (padded["labels"] != IGNORE_INDEX) & (padded["input_ids"] == end))


@pytest.mark.parametrize(
    ("template", "own", "adds"),
    [
        (None, "{{ bos_token }}" + CHATML, True),
        (None, "{{ bos_token }}" + CHATML, False),
        (None, CHATML, True),
        ("chatml", None, True),
        ("{{ bos_token }}" + CHATML, None, True),
    ],
)
def test_exactly_one_begin_token(template: str | None, own: str | None, adds: bool) -> None:
    made = encoder(template, own, adds_begin=adds)
    begin = made.tokenizer.bos_token_id
    ((ids, labels),) = made.encode(chat_of(TWO, "all"))
    prompt = made.prompt(chat_of(TWO[:2]))
    assert (ids[0], ids.count(begin), labels[0]) == (begin, 1, IGNORE_INDEX)
    assert (prompt[0], prompt.count(begin)) == (begin, 1)


def test_no_begin_token_where_neither_writes_one() -> None:
    made = encoder()
    assert made.tokenizer.bos_token_id not in made.prompt(chat_of(TWO[:2]))


def test_special_tokens_in_a_text_are_text() -> None:
    made = encoder()
    turns = [{"role": "user", "content": "a<|im_end|>\n<|im_start|>b"}, {"role": "assistant", "content": "c </s> d"}]
    chat = chat_of(turns, "all")
    ((ids, _),) = made.encode(chat)
    assert made.tokenizer.decode(ids) == made.tokenizer.apply_chat_template(turns, tokenize=False)
    counts = [ids.count(made.special[token]) for token in ("<|im_start|>", "<|im_end|>", "</s>")]
    assert counts == [2, 2, 0]
    assert made.special_in(chat) == ["</s>", "<|im_end|>", "<|im_start|>"]
    assert trained(made, chat) == [["c </s> d<|im_end|>\n"]]


def test_tokens_that_are_not_special_stay_tokens() -> None:
    made = encoder()
    ((ids, _),) = made.encode(chat_of([TWO[1], {"role": "assistant", "content": "<think>x</think>y"}], "all"))
    assert made.tokenizer.convert_tokens_to_ids("<think>") in ids


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each() -> None:
    turns = [TWO[1], {"role": "assistant", "content": "<think>x</think>one"}]
    turns += [TWO[3], {"role": "assistant", "content": "<think>y</think>two"}]
    made, chat = encoder(own=FORGETFUL), chat_of(turns, "all")
    assert trained(made, chat) == [["<think>x</think>one<|im_end|>\n"], ["<think>y</think>two<|im_end|>\n"]]
    for turn, (ids, _) in zip((1, 3), made.encode(chat), strict=True):
        prompt = made.prompt(chat.before(turn))
        assert ids[: len(prompt)] == prompt
    assert "x" not in made.tokenizer.decode(made.encode(chat)[1][0]), "as in generation, the thought is gone"


def test_a_template_that_closes_each_conversation_needs_one_row() -> None:
    assert trained(encoder(own=CLOSING), chat_of(TWO, "all")) == [
        ["\n\nChào\tbạn!\n<|im_end|>\n", "ok<|im_end|>\n</s>"]
    ]


def test_marks_are_used_where_a_prefix_does_not_render() -> None:
    strict = "{% if messages[-1]['role'] != 'assistant' %}{{ raise_exception('expected a reply') }}{% endif %}"
    turns = [TWO[1], {"role": "assistant", "content": "one\n"}, *TWO[3:]]
    assert trained(encoder(own=strict + MARKED), chat_of(turns, "all")) == [["one\n<|im_end|>", "ok<|im_end|>"]]
    assert trained(encoder(own=strict + MARKED), chat_of(turns, "last")) == [["ok<|im_end|>"]]
    with pytest.raises(DataError, match=r"assistant turns.*expected a reply.*generation"):
        encoder(own=strict + CHATML).encode(chat_of(TWO, "all"))
    with pytest.raises(DataError, match="special token '</s>'"):
        encoder(own=strict + MARKED).encode(chat_of([{"role": "user", "content": "</s>"}, TWO[2]], "all"))


def test_a_conversation_that_the_assistant_begins_needs_marks() -> None:
    turns = [{"role": "assistant", "content": "Hello!"}, *TWO[1:]]
    with pytest.raises(DataError, match="Begin the conversation with a user turn"):
        encoder().encode(chat_of(turns, "all"))
    assert trained(encoder(own=MARKED), chat_of(turns, "all"))[0][0] == "Hello!<|im_end|>"
    assert trained(encoder(), chat_of(turns, "last")) == [["ok<|im_end|>\n"]]


def test_a_generation_prompt_that_the_history_lacks() -> None:
    """The reply begins where the two texts differ."""
    thinking = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    assert trained(encoder(own=thinking), chat_of(TWO, "all"))[0][1] == "ok<|im_end|>\n"


def test_tools_and_calls_are_written_or_refused() -> None:
    turns = [TWO[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "31 °C"}, {"role": "assistant", "content": "Hot."}]
    chat = chat_of(turns, "all", TOOLS)
    assert trained(encoder(own=WITH_TOOLS), chat) == [
        ['{"name": "weather", "arguments": {"city": "Huế"}}<|im_end|>\n', "Hot.<|im_end|>\n"]
    ]
    with pytest.raises(DataError, match=r"does not write the tool 'weather'.*chat_template"):
        encoder().encode(chat)
    with pytest.raises(DataError, match="does not write the call of 'weather' in turn 1"):
        encoder().encode(chat_of(turns, "all"))


def test_what_a_template_cannot_render_is_named() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"system, user, assistant.*no system turns.*task\.chat_template"):
        encoder(own=refusing).encode(chat_of(TWO, "all"))
    with pytest.raises(DataError, match=r"does not write the assistant's turns"):
        encoder(own="{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}").encode(
            chat_of(TWO, "all")
        )
    with pytest.raises(
        DataError, match=r"cannot render any conversation: line 4 of it: Unexpected end.*'if'\. Correct it"
    ):
        encoder(own=CHATML.replace("{% endif %}", "")).prompt(chat_of(TWO[:2]))


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(ModelError, match=r"no chat template.*task\.chat_template=chatml"):
        encoder(own=None)
    made = encoder("chatml", own=None)
    assert trained(made, chat_of(TWO, "all"))[0][1] == "ok<|im_end|>\n"


def test_chatml_ends_turns_with_the_end_token_of_a_tokenizer_without_its_own() -> None:
    tokenizer = chat_tokenizer(None, eos_token="</s>")
    tokenizer.get_vocab = lambda: {"</s>": 1}  # type: ignore[method-assign]
    made = ChatEncoder(tokenizer, "chatml", "shop")
    assert made.end_tokens() == [tokenizer.eos_token_id]
    assert trained(made, chat_of(TWO, "last")) == [["ok</s>\n"]]


def test_end_tokens() -> None:
    made = encoder(eos_token="</s>")
    assert made.tokenizer.convert_ids_to_tokens(made.end_tokens()) == ["<|im_end|>"]
    assert encoder(own=CHATML.replace("<|im_end|>", "")).end_tokens() == []


def test_a_template_from_a_file(tmp_path: Any) -> None:
    (tmp_path / "own.jinja").write_text(MARKED)
    assert read_template(str(tmp_path / "own.jinja")) == MARKED
    assert read_template(MARKED) == MARKED
    assert read_template("chatml") == "chatml"
    with pytest.raises(ConfigError, match=r"task\.chat_template: expected chatml or a file.*nowhere"):
        read_template("nowhere.jinja")
