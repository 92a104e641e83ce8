"""What `plan` says about rows, against rows whose lengths, labels and duplicates are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.core.errors import DataError
from lora_hf.data.overview import describe_data
from lora_hf.data.tasks.registry import task_of
from lora_hf.models.load import load_tokenizer


def write(path: Path, header: str, rows: list[str]) -> None:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def test_lengths_labels_and_duplicates_of_a_classification(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label", ["the,no", "the the,no", "the the the the the the,yes"])
    write(tmp_path / "validation.csv", "text,label", ["the the,yes", "a,no"])
    task = task_of(TaskConfig(name="mine", kind="classification", label_names=("no", "yes")))
    tokenizer = load_tokenizer(ModelConfig(name="tiny-roberta"))
    words = [len(tokenizer(" ".join(["the"] * count))["input_ids"]) for count in (1, 2, 6)]  # type: ignore[arg-type]
    data = describe_data(task, task.load(str(tmp_path), task.splits), tokenizer, words[1])
    training, validation = data.splits["train"], data.splits["validation"]
    assert (training.rows, training.measured, training.cut) == (3, 3, 1)
    assert (training.lengths["median"], training.lengths["longest"]) == (words[1], words[2])
    assert training.tokens == words[0] + 2 * words[1]
    assert (training.labels, validation.labels) == ({"no": 2, "yes": 1}, {"no": 1, "yes": 1})
    assert data.duplicates == {"validation are also in train": 1}
    lines = data.lines()
    assert "1 of 3 are cut" in lines[0]
    assert "the end of their texts" in lines[0]
    assert "cut" not in lines[1]
    assert lines[-1] == "1 rows of validation are also in train"
    assert data.examples[0] == [(tokenizer.decode(tokenizer("the")["input_ids"]), False)]  # type: ignore[arg-type]


def test_empty_texts_are_counted_and_a_split_without_any_text_is_an_error(tmp_path: Path) -> None:
    pair = TaskConfig(name="mine", kind="classification", text_columns=("a", "b"), label_names=("no", "yes"))
    write(tmp_path / "train.csv", "a,b,label", ["the,,no", ",the,yes", '" ","",yes'])
    write(tmp_path / "validation.csv", "a,b,label", ["the,the,yes"])
    task, tokenizer = task_of(pair), load_tokenizer(ModelConfig(name="tiny-roberta"))
    data = describe_data(task, task.load(str(tmp_path), task.splits), tokenizer, 512)
    assert {name: split.empty for name, split in data.splits.items()} == {"train": 1, "validation": 0}
    assert "1 have no text" in data.lines()[0]
    assert "no text" not in data.lines()[1]
    write(tmp_path / "validation.csv", "a,b,label", [",,yes", '" ",,no'])
    with pytest.raises(DataError, match="no row of split 'validation' has a text in 'a' or 'b'"):
        describe_data(task, task.load(str(tmp_path), task.splits), tokenizer, 512)


@pytest.mark.parametrize("limit", [512, 12])
def test_the_trained_part_of_a_completion_is_marked(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "train.csv", "prompt,completion", ["a long prompt that has many words in it and more,short"])
    write(tmp_path / "validation.csv", "prompt,completion", ["a,b"])
    task = task_of(TaskConfig(name="mine", kind="generation"))
    tokenizer = load_tokenizer(ModelConfig(name="tiny-gpt2"))
    data = describe_data(task, task.load(str(tmp_path), task.splits), tokenizer, limit)
    (prompt, trained), (completion, learned) = data.examples[0]
    assert (trained, learned) == (False, True)
    assert completion == f" short{tokenizer.eos_token}"
    assert prompt.startswith("a long prompt") == (limit == 512)
    assert data.splits["train"].cut == (limit == 12)
    assert data.splits["train"].loses == "the start of their prompts"
