"""Tokens are cached by all that they depend on, and made again if the file is damaged."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import SeamlessM4TTokenizer

from lora_hf.core.child_process import package_environment
from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.data import tokenization
from lora_hf.data.tasks.registry import get_task, task_of
from lora_hf.models.load import load_tokenizer

TASK = get_task("rule-sentiment")


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(ModelConfig(name="tiny-roberta"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tokenization, "MIN_CACHED_ROWS", 3)
    return tmp_path / "lora_hf"


def rows(label: int = 1) -> Dataset:
    texts = ["a warm soup", "a cold plate", "nothing at all"]
    return Dataset.from_dict({TASK.text_columns[0]: texts, "label": [0, label, 0]})


def test_the_second_time_nothing_is_tokenized(cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenization.encode(TASK, rows(), tokenizer, 64)
    tokenizer(["something"], padding=True, truncation=True, max_length=7)  # changes the tokenizer's state
    monkeypatch.setattr(type(TASK), "encode", lambda *_: pytest.fail("tokenized again"))
    again = tokenization.encode(TASK, rows(), tokenizer, 64)
    assert again.to_list() == first.to_list()
    assert len(list(cache.glob("*.arrow"))) == 1


def test_other_rows_lengths_and_tokenizers_have_other_keys(cache: Path, tokenizer: Any) -> None:
    labels = [tokenization.encode(TASK, rows(label), tokenizer, 64)["labels"][:] for label in (1, 0)]
    assert labels == [[0, 1, 0], [0, 0, 0]]
    assert max(map(len, tokenization.encode(TASK, rows(), tokenizer, 4)["input_ids"])) == 4
    tokenizer.add_tokens(["soup"])
    tokenization.encode(TASK, rows(), tokenizer, 64)
    assert len(list(cache.glob("*.arrow"))) == 4


def test_the_side_that_is_truncated_is_part_of_the_key(cache: Path, tokenizer: Any) -> None:
    first = tokenization.encode(TASK, rows(), tokenizer, 4)["input_ids"][:]
    tokenizer.truncation_side = "left"
    other = tokenization.encode(TASK, rows(), tokenizer, 4)["input_ids"][:]
    assert other == [
        tokenizer(text, truncation=True, max_length=4)["input_ids"] for text in rows()[TASK.text_columns[0]]
    ]
    assert other != first
    tokenizer.padding_side = "left"  # the rows are not padded
    assert tokenization.encode(TASK, rows(), tokenizer, 4)["input_ids"][:] == other
    assert len(list(cache.glob("*.arrow"))) == 2


@pytest.mark.parametrize(("language", "column"), [("src_lang", "input_ids"), ("tgt_lang", "labels")])
def test_the_languages_of_the_tokenizer_are_part_of_the_key(language: str, column: str, cache: Path) -> None:
    """A task without languages of its own uses those of the tokenizer, which its file need not hold."""
    task = task_of(TaskConfig("translation", kind="seq2seq"))
    texts = Dataset.from_dict({"source": ["a", "b", "c"], "target": ["a", "b", "c"]})
    codes = ["__eng__", "__fra__"]
    tokenizers = [SeamlessM4TTokenizer(additional_special_tokens=codes, **{language: code}) for code in codes]
    for tokenizer in tokenizers:
        ids = tokenization.encode(task, texts, tokenizer, 16)[column][:]
        assert all(tokenizer.convert_tokens_to_ids(getattr(tokenizer, language)) in row for row in ids)


@pytest.mark.parametrize("name", ["sst2", "web_nlg"])
def test_the_key_is_the_same_in_every_process(name: str) -> None:
    code = f"from lora_hf.data.tasks.registry import get_task; print(get_task({name!r}))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env=package_environment() | {"PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in "12"
    }
    assert len(printed) == 1, "the key is made of the task's repr"


def test_a_damaged_file_is_replaced(cache: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = tokenization.encode(TASK, rows(), tokenizer, 64).to_list()
    (file,) = cache.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert tokenization.encode(TASK, rows(), tokenizer, 64).to_list() == first
    assert "damaged" in caplog.text
    assert len(file.read_bytes()) > 100


def test_a_run_goes_on_without_a_cache(cache: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file in place of the folder", encoding="utf-8")
    assert len(tokenization.encode(TASK, rows(), tokenizer, 64)) == 3
    assert "not cached" in caplog.text


def test_few_rows_are_not_cached(cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "MIN_CACHED_ROWS", 4)
    tokenization.encode(TASK, rows(), tokenizer, 64)
    assert not cache.exists()
