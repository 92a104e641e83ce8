"""Questions and answers: both forms of a file, windows of long contexts, and every way in which rows are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.data.tasks.question_answering import QuestionAnswering
from lora_hf.data.tasks.registry import task_of
from lora_hf.models.load import load_tokenizer
from tests.support.split_files import columns, load, message

HOMES = TaskConfig("homes", kind="question_answering")
HOMES_2 = replace(HOMES, null_score_threshold=0.0)
CONTEXT = "The office is closed. Li Wei lives in Oslo, and nobody else does so at all in this town."
START = CONTEXT.index("Oslo")
ANSWER = {"text": "Oslo", "answer_start": START}
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Homes",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {"question": "Where does Li Wei live?", "answers": [ANSWER, ANSWER]},
                        {"question": "Who left?", "is_impossible": True, "answers": [], "plausible_answers": [ANSWER]},
                    ],
                }
            ],
        }
    ],
}  # fmt: skip


def task(config: TaskConfig = HOMES_2) -> QuestionAnswering:
    return cast(QuestionAnswering, task_of(config))


def test_both_forms_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(SQUAD))
    nested = columns(HOMES_2, tmp_path)
    assert nested["answer_texts"] == [["Oslo", "Oslo"], []]
    assert nested["answer_starts"] == [[START, START], []]
    answers = {"text": ["Oslo"] * 2, "answer_start": [START] * 2}
    flat = [
        {"question": "Where does Li Wei live?", "context": CONTEXT, "answers": answers},
        {"question": "Who left?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    ]  # fmt: skip
    (tmp_path / "train.json").unlink()
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in flat))
    assert columns(HOMES_2, tmp_path) == nested
    assert "1 of 2 questions have no answer, the first is row 1" in message(HOMES, tmp_path)
    assert "task.null_score_threshold: 0.0" in message(HOMES, tmp_path)


def row(**changes: Any) -> str:
    return (
        json.dumps(
            {"question": "Where?", "context": "In Oslo.", "answers": [{"text": "Oslo", "answer_start": 3}], **changes}
        )
        + "\n"
    )


WRONG: dict[str, tuple[str, str]] = {
    "another start": (
        row(answers=[{"text": "Oslo", "answer_start": 2}]),
        "column 'answers': expected the answer 'Oslo' at its answer_start 2",
    ),
    "not in the context": (row(answers=[{"text": "Rome", "answer_start": 2}]), "it is not in the context"),
    "no question": (row(question=""), "column 'question': expected a text; found ''"),
    "no context": (row(context=None), "column 'context': expected a text; found None"),
    "lists of two lengths": (
        row(answers={"text": ["a"], "answer_start": []}),
        "expected an object with the lists text and answer_start",
    ),
    "a bare answer": (row(answers="Oslo"), "found 'Oslo'"),
    "another column": (row().replace('"context"', '"contxt"'), "no column 'context' (did you mean 'contxt'?)"),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    found = message(HOMES, tmp_path)
    assert found.startswith(str(tmp_path / "train.jsonl"))
    assert expected in found
    assert "row 0 (counting from 0)" in found or "no column" in found


def test_a_damaged_squad_file(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"data": [{"paragraphs": [{"context": "b"}]}]}')
    assert "data[0].paragraphs[0]: expected an object with a list 'qas'" in message(HOMES, tmp_path)
    for text, expected in (
        ('{"data": %s}' % ("[" * 200 + "]" * 200), "levels of nesting"),
        ('{\n "data": [],\n "data": []\n}', "'data' appears more than once"),
        ('{\n "data": [\n}', "not a JSON object"),
    ):
        (tmp_path / "train.json").write_text(text)
        assert expected in message(HOMES, tmp_path)


def test_wrong_configs() -> None:
    for changes, expected in (
        ({"text_columns": ("question",)}, "expected the columns of the question and of the context"),
        ({"label_names": ("a", "b")}, "has no classes"),
    ):
        with pytest.raises(ConfigError) as error:
            task(replace(HOMES, **changes))
        assert expected in str(error.value)


@pytest.mark.parametrize("base", ["tiny-roberta", "tiny-gpt2"])
@pytest.mark.parametrize("stride", [None, 0, 500])
def test_windows_find_the_answer(base: str, stride: int | None, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(SQUAD))
    rows = load(HOMES_2, tmp_path)
    answers = task(replace(HOMES_2, stride=stride))
    tokenizer = load_tokenizer(ModelConfig(name=base))
    encoded = answers.encode(rows[:], tokenizer, 24)
    assert max(map(len, encoded["input_ids"])) <= 24
    targets = list(zip(encoded["start_positions"], encoded["end_positions"], strict=True))
    found = {
        tokenizer.decode(ids[start : end + 1]).strip().lower()
        for ids, (start, end) in zip(encoded["input_ids"], targets, strict=True)
        if start
    }
    assert found == {"oslo"}
    logits = []
    for ids, (start, end) in zip(encoded["input_ids"], targets, strict=True):
        output = np.zeros((len(ids) + 2, 2))  # as padded on the right
        output[start, 0] = output[end, 1] = 9 if start else 4
        output[len(ids) :] = 50
        logits.append(output)
    outputs = answers.row_outputs(logits, encoded, rows)
    assert [(output.text, output.start) for output in outputs] == [("Oslo", START), ("", None)]
    assert answers.score_rows(outputs, rows)["exact_match"] == 1
    assert answers.format_answer(outputs[1])["end"] is None


def test_an_answer_does_not_depend_on_other_rows() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny-roberta"))
    questions = ["Where?", "Where is the house of the man " * 2]
    alone = [task().encode({"question": [each], "context": [CONTEXT]}, tokenizer, 32) for each in questions]
    both = task().encode({"question": questions, "context": [CONTEXT] * 2}, tokenizer, 32)
    assert both["input_ids"] == [ids for each in alone for ids in each["input_ids"]]


def test_a_question_that_leaves_no_space() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny-roberta"))
    with pytest.raises(DataError, match="leave 0 of 16 tokens for the text"):
        task().encode({"question": ["why " * 20], "context": ["Oslo"]}, tokenizer, 16)
