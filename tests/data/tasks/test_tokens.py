"""Tokens tasks: each form of a file, the words of a text, windows of long rows, and wrong rows."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.metrics.tokens import score_tags, spans_of
from lora_hf.data.tasks.registry import task_of
from lora_hf.data.tasks.tokens import TokenClassification
from lora_hf.data.tasks.words import repair_bio, split_words
from lora_hf.models.load import load_tokenizer
from tests.support.split_files import columns, message

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
PEOPLE = TaskConfig("people", kind="tokens", label_names=("PER", "LOC"))
ROWS = {
    "text": ["Tom Brandt left New York .", "Oslo"],
    "starts": [[0, 4, 11, 16, 20, 25], [0]],
    "ends": [[3, 10, 15, 19, 24, 26], [4]],
    "tags": [[1, 2, 0, 3, 4, 0], [3]],
}
CONLL = """\
-DOCSTART- -X- O

Tom NNP B-PER
Brandt NNP I-PER
left VBD O
New NNP B-LOC
York NNP I-LOC
. . O


Oslo NNP B-LOC
"""


def task(config: TaskConfig = PEOPLE) -> TokenClassification:
    return cast(TokenClassification, task_of(config))


@pytest.mark.parametrize(("name", "text"), [("train.conll", CONLL), ("train.txt", CONLL.replace(" ", "\t"))])
def test_conll_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert columns(PEOPLE, tmp_path) == ROWS


def test_another_column_of_a_conll_file(tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text(CONLL)
    speech = TaskConfig("speech", kind="tokens", label_column="1", label_names=("NNP", "VBD", "."), metric="accuracy")
    assert columns(speech, tmp_path)["tags"] == [[0, 0, 1, 0, 0, 2], [0]]


def test_tokens_and_tags(tmp_path: Path) -> None:
    rows = [
        {"tokens": text.split(), "tags": [NAMES[tag] for tag in tags]}
        for text, tags in zip(ROWS["text"], ROWS["tags"], strict=True)
    ]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert columns(PEOPLE, tmp_path) == ROWS


def test_a_parquet_file_with_named_tags(tmp_path: Path) -> None:
    """The ids of the file mean its own names, whatever their order in the config."""
    names = list(reversed(NAMES))
    features = Features(words=Sequence(Value("string")), ner=Sequence(ClassLabel(names=names)))
    tags = [[names.index(NAMES[tag]) for tag in row] for row in ROWS["tags"]]
    rows = Dataset.from_dict({"words": [text.split() for text in ROWS["text"]], "ner": tags}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    found = columns(replace(PEOPLE, text_columns=("words",), label_column="ner"), tmp_path)
    assert found["tags"] == ROWS["tags"]


def test_texts_with_spans(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spans = [{"start": 0, "end": 10, "label": "PER"}, {"start": 16, "end": 24, "label": "LOC"}]
    rows = [{"text": "Tom Brandt left New York.", "spans": spans}, {"text": "Nobody came.", "spans": []}]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert columns(PEOPLE, tmp_path)["tags"] == [[1, 2, 0, 3, 4, 0], [0, 0, 0]]
    assert not caplog.records
    rows[0]["spans"] = [{"start": 0, "end": 10, "label": "PER"}, {"start": 16, "end": 22, "label": "LOC"}]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert columns(PEOPLE, tmp_path)["tags"][0] == [1, 2, 0, 3, 4, 0]
    assert "'New Yo' became 'New York'" in caplog.text


LINES = {
    "a tag too few": ({"tokens": ["a", "b"], "tags": ["O"]}, "column 'tags': expected a list of 2 tags"),
    "an empty token": ({"tokens": ["a", " "], "tags": ["O", "O"]}, "column 'tokens': expected tokens that are text"),
    "a part of speech": ({"tokens": ["a"], "tags": ["DET"]}, "set task.metric: accuracy"),
    "no tokens": ({"tokens": [], "tags": []}, "column 'tokens': expected a list of tokens, at least one; found []"),
    "another column": ({"words": ["a"], "tags": ["O"]}, "no column 'tokens'; found: words, tags"),
    "a span past the end": (
        {"text": "Tom", "spans": [{"start": 0, "end": 9, "label": "PER"}]},
        "row 0 (counting from 0), column 'spans': expected spans with 0 <= start < end <= 3",
    ),
    "an unknown type": (
        {"text": "Tom", "spans": [{"start": 0, "end": 3, "label": "PERS"}]},
        "found 'PERS' (did you mean 'PER'?)",
    ),
    "spans that overlap": (
        {"text": "Tom", "spans": [{"start": 0, "end": 2, "label": "PER"}, {"start": 1, "end": 3, "label": "PER"}]},
        "expected spans that do not overlap",
    ),
}
WRONG: dict[str, tuple[str, str, str]] = {
    "a line with fewer columns": ("train.conll", "Tom B-PER\nx\n", "line 2: expected a token and its tag in 2 columns"),
    "no tags": ("train.conll", "Tom\n", "line 1: expected a token and its tag in at least 2 columns"),
    "an unknown tag": ("train.conll", "a O\nTom B-PRE\n", "line 2 has the tag 'B-PRE'; expected one of"),
    "no sentence": ("train.conll", "-DOCSTART- O\n", "no rows; expected at least one"),
    "text instead of tags": ("train.csv", "tokens,tags\na b,O O\n", "column 'tags': expected a list of objects"),
    **{name: ("train.jsonl", f"{json.dumps(row)}\n", expected) for name, (row, expected) in LINES.items()},
}


@pytest.mark.parametrize(("name", "text", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    found = message(PEOPLE, tmp_path)
    assert found.startswith(str(tmp_path / name))
    assert expected in found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label_names": None}, "task.label_names: expected the types of spans"),
        ({"label_names": ("B-PER", "I-PER")}, "found B-PER, I-PER"),
        ({"text_columns": ("a", "b")}, "expected one column"),
        ({"metric": "macro_f1"}, "expected one of f1, accuracy"),
        ({"prefix": "x"}, "task.prefix: only for task.kind=seq2seq"),
        ({"null_score_threshold": 0.0}, "only for task.kind=question_answering"),
    ],
)
def test_wrong_configs(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        task(replace(PEOPLE, **changes))
    assert expected in str(error.value)


def test_words_of_a_text() -> None:
    words = split_words("Tom (from the U.S.) paid 3.14, “don't” 東京abc!")
    assert list(words) == [
        "Tom",
        "(",
        "from",
        "the",
        "U.S",
        ".",
        ")",
        "paid",
        "3.14",
        ",",
        "“",
        "don't",
        "”",
        "東",
        "京",
        "abc",
        "!",
    ]


def test_only_the_first_token_of_a_word_has_a_label() -> None:
    for base in ("tiny-roberta", "tiny-gpt2"):  # word pieces, and bytes with the space in front
        tokenizer = load_tokenizer(ModelConfig(name=base))
        encoded = task().encode(ROWS, tokenizer, 64)
        for row, (ids, labels) in enumerate(zip(encoded["input_ids"], encoded["labels"], strict=True)):
            assert [label for label in labels if label != IGNORE_INDEX] == ROWS["tags"][row]
            firsts = [
                tokenizer.decode([token]).strip()
                for token, label in zip(ids, labels, strict=True)
                if label != IGNORE_INDEX
            ]
            words = [text.lower() for text in ROWS["text"][row].split()]
            assert all(word.startswith(first.lower()) for word, first in zip(words, firsts, strict=True))


@pytest.mark.parametrize("base", ["tiny-roberta", "tiny-gpt2"])
@pytest.mark.parametrize("stride", [None, 0, 3, 99])
def test_windows_lose_and_repeat_no_word(base: str, stride: int | None) -> None:
    tokenizer = load_tokenizer(ModelConfig(name=base))
    tokens = task(replace(PEOPLE, stride=stride))
    choice = random.Random(0)
    texts = [
        " ".join(choice.choice(["unbelievable", "Tom", "x", "New"]) for _ in range(length)) for length in (1, 40, 7)
    ]
    words = [split_words(text) for text in texts]
    tags = [[choice.randrange(5) for _ in row] for row in words]
    rows = {"text": texts, "starts": [row.starts for row in words], "ends": [row.ends for row in words], "tags": tags}
    encoded = tokens.encode(rows, tokenizer, 12)
    assert max(map(len, encoded["input_ids"])) <= 12
    assert len(encoded["input_ids"]) > 3
    logits = [np.eye(5)[[max(label, 0) for label in [*labels, 0]]] for labels in encoded["labels"]]
    outputs = tokens.row_outputs(logits, encoded, rows)
    assert [output.logits.argmax(axis=1).tolist() for output in outputs] == tags
    labeled = sum(label != IGNORE_INDEX for labels in encoded["labels"] for label in labels)
    assert labeled == sum(map(len, tags))


def test_a_word_that_fills_several_windows_has_the_tag_of_its_first_token() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny-gpt2"))
    rows = {"text": ["a " + "x9" * 60 + " b"], "starts": [[0, 2, 123]], "ends": [[1, 122, 124]], "tags": [[0, 1, 3]]}
    encoded = task().encode(rows, tokenizer, 12)
    first = next(index for index, words in enumerate(encoded["words"]) if 1 in words)
    assert first == 0
    assert encoded["labels"][0][encoded["positions"][0][encoded["words"][0].index(1)]] == 1


def test_a_word_without_a_token_is_outside() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny-roberta"))
    rows = {"text": ["Tom x left"], "starts": [[0, 4, 6]], "ends": [[3, 5, 10]]}
    encoded = task().encode(rows, tokenizer, 16)
    for column in ("words", "positions"):  # as of a character that a tokenizer drops
        del encoded[column][0][1]
    (output,) = task().row_outputs([np.tile([0.0, 9, 0, 0, 0], (16, 1))], encoded, rows)
    assert task().predicted_tags(output) == ["B-PER", "O", "B-PER"]
    assert any("no token for 1 word" in problem for problem in task().weaknesses([output]))


def test_predictions_are_repaired_and_scored_as_seqeval_does() -> None:
    assert repair_bio(["I-A", "I-A", "O", "I-B", "B-A", "I-B"]) == ["B-A", "I-A", "O", "B-B", "B-A", "B-B"]
    choice = random.Random(1)
    tags, predictions = ([[choice.choice(NAMES) for _ in range(9)] for _ in range(50)] for _ in range(2))
    scores = score_tags(list(map(repair_bio, predictions)), tags, marks_spans=True)
    expected = [metric(tags, predictions) for metric in (f1_score, precision_score, recall_score)]
    assert [scores[name] for name in ("f1", "precision", "recall")] == pytest.approx(expected)


def test_spans_are_those_of_seqeval_for_any_tags() -> None:
    choice = random.Random(2)
    names = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("A", "B-C"))]
    for _ in range(300):
        tags = [choice.choice(names) for _ in range(8)]
        assert spans_of(tags) == get_entities(tags)
    assert score_tags([["O"]], [["O"]], marks_spans=True)["f1"] == 0


def test_logits_that_are_not_finite() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny-roberta"))
    encoded = task().encode(ROWS, tokenizer, 16)
    with pytest.raises(TrainingError, match="not finite"):
        task().row_outputs([np.full((16, 5), np.nan)] * 2, encoded, ROWS)
