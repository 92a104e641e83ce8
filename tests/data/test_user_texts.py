"""Special tokens in a user's text are text: in training, predictions, prompts and pairs of texts."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_hf.core.config.schema import ModelConfig
from lora_hf.data.tasks import user_texts
from lora_hf.data.tasks.generation import TextToText
from lora_hf.data.tasks.registry import get_task
from lora_hf.data.tasks.user_texts import encode_texts, honored_tokens
from lora_hf.data.tokenization import encode
from lora_hf.models.load import load_tokenizer
from tests.support.tokenizers_by_kind import SEPARATORS, SPECIAL, tokenizer_of
from tests.support.word_tokenizer import word_tokenizer

SPLITTING = [kind for kind in SPECIAL if kind != "t5"]


def count(ids: list[int], tokenizer: Any, token: str) -> int:
    return ids.count(tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize("kind", SPLITTING)
@pytest.mark.parametrize("column", [0, 1])
def test_a_classifier_reads_a_separator_as_text(kind: str, column: int) -> None:
    tokenizer, token, task = tokenizer_of(kind), SEPARATORS[kind], get_task("mrpc")
    plain = ["a warm film", "a slow film"]
    hostile = [f"{text} {token} funny" if index == column else text for index, text in enumerate(plain)]

    def ids(texts: list[str]) -> list[int]:
        return task.encode({"sentence1": [texts[0]], "sentence2": [texts[1]]}, tokenizer, 64)["input_ids"][0]

    assert count(ids(hostile), tokenizer, token) == count(ids(plain), tokenizer, token)
    assert len(ids(hostile)) > len(ids(plain)), "the text of the token is not dropped either"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_end_token_in_a_prompt_or_a_completion_ends_nothing(kind: str) -> None:
    tokenizer, token = tokenizer_of(kind), SEPARATORS[kind]
    task = TextToText(name="mine", source=None, text_columns=("prompt", "completion"), metric="e2e_nlg")  # type: ignore[arg-type]
    (prompt,) = task.prompts([f"a warm {token} film"], tokenizer, 64)
    assert count(prompt, tokenizer, token) == 1, "the separator alone"
    rows = {"prompt": [f"a {token} film"], "completion": [f"a slow {token} film"]}
    (row,) = task.encode(rows, tokenizer, 128)["input_ids"]
    assert count(row, tokenizer, token) == 2, "the separator and the end"


@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-gpt2"])
def test_the_bundled_tokenizers_honor_no_token_in_a_text(name: str) -> None:
    assert honored_tokens(load_tokenizer(ModelConfig(name=name))) == []


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_a_unigram_honors_them_as_words_of_its_vocabulary(kind: str) -> None:
    assert ("</s>" in honored_tokens(tokenizer_of(kind))) == (kind == "t5")
    assert bool(honored_tokens(tokenizer_of(kind))) == (kind == "t5")


def test_a_tokenizer_that_cannot_split_names_the_rows(caplog: pytest.LogCaptureFixture) -> None:
    task, tokenizer = get_task("rule-sentiment"), word_tokenizer(pad_token="<pad>", model_max_length=64)
    texts = ["w1 w2", "w1 </s> w2", "w3", "</s>"]
    with caplog.at_level(logging.WARNING):
        encode(task, Dataset.from_dict({task.text_columns[0]: texts, "label": [0, 1, 0, 1]}), tokenizer, 16, "train")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "rule-sentiment, train: 2 of 4 texts" in message
    assert "</s>" in message
    assert message.endswith("1, 3")


def test_rows_without_such_tokens_make_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    task, tokenizer = get_task("rule-sentiment"), word_tokenizer(pad_token="<pad>", model_max_length=64)
    with caplog.at_level(logging.WARNING):
        encode(task, Dataset.from_dict({task.text_columns[0]: ["w1 w2"], "label": [0]}), tokenizer, 16, "train")
    assert not caplog.records


@pytest.mark.full
@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-gpt2"])
@pytest.mark.parametrize("task_name", ["sst2", "mrpc", "cola", "rte"])
def test_real_texts_keep_their_tokens(name: str, task_name: str, data_dir: Path) -> None:
    task, tokenizer = get_task(task_name), load_tokenizer(ModelConfig(name=name))
    rows = task.load(str(data_dir), ["validation"])["validation"]
    for column in task.text_columns:
        texts = rows[column][:]
        assert encode_texts(tokenizer, texts)["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.mark.full
def test_real_prompts_keep_their_tokens(data_dir: Path) -> None:
    task, tokenizer = get_task("e2e_nlg"), load_tokenizer(ModelConfig(name="tiny-gpt2"))
    rows = task.load(str(data_dir), ["validation"])["validation"]
    texts = [text for example in task.examples(rows) for text in (example.context, *example.references)]  # type: ignore[attr-defined]
    assert encode_texts(tokenizer, texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_no_task_calls_a_tokenizer_itself() -> None:
    folder = Path(user_texts.__file__).parent
    calls = [
        f"{file.name}:{node.lineno}"
        for file in folder.glob("*.py")
        if file.name != Path(user_texts.__file__).name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tokenizer"
    ]
    assert not calls, "encode_texts reads special tokens in them as text"
