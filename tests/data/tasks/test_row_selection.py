"""Stratified validation splits and subsets of the training rows: seeded, in order, and the same for every run."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_hf.core.config.schema import TaskConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.custom import KINDS
from lora_hf.data.tasks.registry import task_of
from tests.data.test_user_files import write_rows
from tests.support.split_files import columns, load, message
from tools.benchmark.label_rows import LABELS, label_rows

SHARES = {"often": 70, "rare": 20, "rarest": 10}
MAIL = TaskConfig("mail", kind="classification", label_names=tuple(SHARES), validation=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = [name for name, count in SHARES.items() for _ in range(count)]
    write_rows(tmp_path / "train.csv", [{"text": f"text {number}", "label": name} for number, name in enumerate(names)])
    return tmp_path


def test_each_class_has_its_share(folder: Path) -> None:
    validation, train = columns(MAIL, folder, "validation"), columns(MAIL, folder)
    assert Counter(validation["label"]) == {0: 7, 1: 2, 2: 1}
    assert Counter(train["label"]) == {0: 63, 1: 18, 2: 9}
    assert not set(train["text"]) & set(validation["text"])
    numbers = [int(text.split()[1]) for text in train["text"]]
    assert numbers == sorted(numbers), "the rows keep their order"


def test_the_split_depends_on_its_own_seed(folder: Path) -> None:
    first = columns(MAIL, folder, "validation")
    assert columns(MAIL, folder, "validation") == first
    assert columns(replace(MAIL, split_seed=1), folder, "validation") != first


def test_rows_with_the_same_text_stay_together(tmp_path: Path) -> None:
    rows = [{"text": f"text {number // 4}", "label": "often"} for number in range(80)]
    write_rows(tmp_path / "train.csv", rows)
    assert not set(columns(MAIL, tmp_path)["text"]) & set(columns(MAIL, tmp_path, "validation")["text"])
    assert len(columns(MAIL, tmp_path, "validation")["text"]) == 8


def test_a_split_needs_rows_and_one_file(folder: Path, tmp_path: Path) -> None:
    assert "leaves 100 to train and 0 to validate on" in message(replace(MAIL, validation=0.001), folder)
    (folder / "validation.csv").write_text("text,label\na,rare\n")
    assert f"also {folder}/validation.csv" in message(MAIL, folder)
    assert "also" in message(MAIL, folder, "validation")


def test_a_part_of_the_training_rows(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = replace(MAIL, train_rows=30)
    assert Counter(columns(part, folder)["label"]) == {0: 21, 1: 6, 2: 3}
    assert columns(part, folder, "validation") == columns(MAIL, folder, "validation")
    everything = columns(MAIL, folder)
    assert columns(replace(MAIL, train_rows=len(everything["label"])), folder) == everything
    assert not caplog.records
    assert columns(replace(MAIL, train_rows=1000), folder) == everything
    assert f"task.train_rows=1000: there are only {len(everything['label'])} training rows" in caplog.text


def test_a_part_of_a_built_in_task() -> None:
    task = task_of(TaskConfig("rule-sentiment", train_rows=50))
    rows = task.load(None, task.splits)
    assert {split: len(part) for split, part in rows.items()} == {"train": 50, "validation": 500}
    with pytest.raises(ConfigError, match="also set task"):
        task_of(TaskConfig("rule-sentiment", validation=0.1))


def test_label_sets_are_drawn_by_their_rarest_label(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", label_rows(400))
    topics = TaskConfig("topics", kind="multi_label", label_names=LABELS, validation=0.25)
    counts = [sum(column) for column in zip(*columns(topics, tmp_path, "validation")["label"], strict=True)]
    everything = [sum(column) for column in zip(*columns(topics, tmp_path)["label"], strict=True)]
    rarest = LABELS.index("praise")
    assert counts[rarest] == pytest.approx((counts[rarest] + everything[rarest]) / 4, abs=1)


REPLIES = (f"Yes, {number}." for number in itertools.count())
# By kind, the values of the text columns and of the label column of a row about a text.
VALUES: dict[str, Callable[[str], tuple[list[Any], Any]]] = {
    "classification": lambda text: ([text], "often"),
    "multi_label": lambda text: ([text], ["often"]),
    "regression": lambda text: ([text], 1.5),
    "generation": lambda text: ([text], "Yes."),
    "seq2seq": lambda text: ([text], "Yes."),
    "tokens": lambda text: ([text.split()], ["O"] * len(text.split())),
    "question_answering": lambda text: ([text, text], [{"text": text, "answer_start": 0}]),
    "chat": lambda text: ([[{"role": "user", "content": text}, {"role": "assistant", "content": next(REPLIES)}]], None),
}
CLASSES = {"classification": ("often", "rare"), "multi_label": ("often", "rare"), "tokens": ("PER", "LOC")}


@pytest.mark.parametrize("prefix", ["", "my_"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_rows_out(kind: Any, prefix: str, tmp_path: Path) -> None:
    texts = tuple(prefix + column for column in KINDS[kind].text_columns)
    label = prefix + KINDS[kind].label_column
    rows = []
    for number in range(40):
        values, answer = VALUES[kind](f"Number {number // 4} is here.")
        rows.append(dict(zip(texts, values, strict=True)) | ({} if answer is None else {label: answer}))
    write_rows(tmp_path / "train.jsonl", rows)
    own = TaskConfig("own", kind=kind, text_columns=texts, label_column=label, label_names=CLASSES.get(kind))
    config = replace(own if prefix else replace(own, text_columns=None, label_column=None), validation=0.2)
    train, validation = load(config, tmp_path), load(config, tmp_path, "validation")
    assert (len(train), len(validation)) == (32, 8)
    numbers = [set(re.findall(r"Number (\d+)", str(part.to_list()))) for part in (train, validation)]
    assert list(map(len, numbers)) == [8, 2], "rows with the same input stay together"
    assert not numbers[0] & numbers[1]
