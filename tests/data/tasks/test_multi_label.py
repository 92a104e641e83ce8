"""Several labels a row: each form in a file, every way in which a row can be wrong, and the inferred names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.core.errors import ConfigError, DataError
from lora_hf.data.tasks.custom import task_section
from lora_hf.data.tasks.label_names import infer_label_names
from lora_hf.data.tasks.multi_label import MultiLabelClassification
from lora_hf.data.tasks.registry import task_of
from lora_hf.models.load import load_tokenizer
from tests.support.split_files import columns, message

NAMES = ("bug", "question", "urgent")
TOPICS = TaskConfig("topics", kind="multi_label", label_names=NAMES)
ROWS = {"text": ["a", "b", "c"], "label": [[1, 0, 1], [0, 0, 0], [0, 1, 0]]}
SETS = [["urgent", "bug"], [], ["question"]]


def write_lines(folder: Path, values: list[Any], column: str = "labels") -> Path:
    rows = [{"text": text, column: value} for text, value in zip("abc", values, strict=False)]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def task() -> MultiLabelClassification:
    return cast(MultiLabelClassification, task_of(TOPICS))


def test_lists(tmp_path: Path) -> None:
    assert columns(TOPICS, write_lines(tmp_path, SETS)) == ROWS
    assert columns(TOPICS, write_lines(tmp_path, [[2, 0], [], [1, 1]])) == ROWS, "ids count from 0"


@pytest.mark.parametrize("kind", [int, float, bool])
def test_a_zero_or_one_for_each_label(tmp_path: Path, kind: type) -> None:
    """As transformers' models take them: read as ids, each row would have the labels 0 and 1."""
    write_lines(tmp_path, [list(map(kind, row)) for row in ROWS["label"]])
    assert columns(TOPICS, tmp_path) == ROWS
    with pytest.raises(DataError, match=r"'labels' has a 0 or 1 for each of 3 labels; set task.label_names"):
        infer_label_names(replace(TOPICS, label_names=None, data_dir=str(tmp_path)))
    two = replace(TOPICS, label_names=NAMES[:2])
    assert columns(two, write_lines(tmp_path, [[1, 0], [0, 1]]))["label"] == [[1, 0], [0, 1]]
    assert columns(two, write_lines(tmp_path, [[0, 1], [0, 1]]))["label"] == [[1, 1], [1, 1]], "two ids"


def test_a_parquet_file_with_named_classes(tmp_path: Path) -> None:
    features = Features(text=Value("string"), labels=List(ClassLabel(names=["urgent", "question", "bug"])))
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "labels": [[0, 2], [], [1]]}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    assert columns(TOPICS, tmp_path) == ROWS
    assert infer_label_names(replace(TOPICS, label_names=None, data_dir=str(tmp_path))).label_names == NAMES


def test_a_column_of_text(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,tags\na,urgent; bug\nb,\nc,question;\n")
    assert columns(replace(TOPICS, label_column="tags", label_separator=";"), tmp_path) == ROWS


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("true", "False"), ("1.0", "0.0")])
def test_columns_of_zeros_and_ones(tmp_path: Path, yes: str, no: str) -> None:
    lines = [
        f"{text},{','.join(yes if on else no for on in row)}" for text, row in zip("abc", ROWS["label"], strict=True)
    ]
    (tmp_path / "train.csv").write_text("\n".join(["text,is_bug,is_question,is_urgent", *lines]) + "\n")
    wide = replace(TOPICS, label_columns=("is_bug", "is_question", "is_urgent"))
    assert columns(wide, tmp_path) == ROWS
    assert task_of(replace(wide, label_names=None)).label_names == ("is_bug", "is_question", "is_urgent")


WRONG: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "an unknown label": (
        [["bug"], ["urgnet"]],
        {},
        "has the label 'urgnet' in column 'labels'; expected labels out of",
    ),
    "a text": (["bug"], {}, "column 'labels': expected a list of labels; found 'bug'; set task.label_separator"),
    "no labels": (
        [["bug"], None],
        {},
        "row 1 (counting from 0), column 'labels': expected a list of labels; found None",
    ),
    "a list": ([["bug"]], {"label_separator": ";"}, "expected labels in a text, separated by ';'; found ['bug']"),
    "two kinds of labels": ([["bug"], ["bug", 3]], {}, "row 1 (counting from 0) has ['bug', 3]"),
    "neither 0 nor 1": (
        [1, 2],
        {"label_columns": ("labels", "other"), "label_names": None},
        "row 1 (counting from 0), column 'labels': expected 0 or 1; found 2",
    ),
}


@pytest.mark.parametrize(("values", "change", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_rows(tmp_path: Path, values: list[Any], change: dict[str, Any], expected: str) -> None:
    path = write_lines(tmp_path, values) / "train.jsonl"
    path.write_text(path.read_text().replace("}", ', "other": 0}'))
    found = message(replace(TOPICS, **change), tmp_path)
    assert found.startswith(f"{tmp_path}/train.jsonl: ")
    assert expected in found


INCOMPLETE: dict[str, tuple[dict[str, Any], str]] = {
    "columns and a column": ({"label_columns": NAMES, "label_column": "tags"}, "replaces task.label_column"),
    "a column twice": ({"label_columns": ("a", "a", "b")}, "expected different columns"),
    "a column without a name": ({"label_columns": ("a", "b")}, "expected a name for each of the 2"),
    "an empty separator": ({"label_separator": ""}, "task.label_separator: expected a character"),
    "too few thresholds": ({"thresholds": (0.5,)}, "task.thresholds: expected one for each of the 3 labels, found 1"),
    "a metric of another kind": ({"metric": "accuracy"}, "expected one of micro_f1, macro_f1, mean_average_precision"),
    "another kind": ({"kind": "classification", "label_separator": ";"}, "only for task.kind=multi_label"),
}


@pytest.mark.parametrize(("change", "expected"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_incomplete_configs(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_of(replace(TOPICS, **change))
    assert expected in str(error.value)


def test_model_inputs_and_head() -> None:
    encoded = task().encode(ROWS, load_tokenizer(ModelConfig(name="tiny-roberta")), 16)
    assert encoded["labels"] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    head = task().head_config()
    assert (head["num_labels"], head["problem_type"]) == (3, "multi_label_classification")


def test_thresholds_decide() -> None:
    logits = np.array([0.0, -1.0, 2.0])
    assert task().format_answer(logits) == {
        "labels": ["bug", "urgent"],
        "probabilities": {"bug": 0.5, "question": 0.2689, "urgent": 0.8808},
    }
    chosen = cast(MultiLabelClassification, task_of(replace(TOPICS, thresholds=(0.6, 0.2, 0.9))))
    assert chosen.format_answer(logits)["labels"] == ["question"]
    assert task_section(chosen)["thresholds"] == (0.6, 0.2, 0.9)
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [[1, 0, 1], [0, 1, 0]]})
    outputs = np.array([[-1.0, -3.0, 0.5], [-2.0, -2.0, 0.4]])
    fitted = task().calibrated(outputs, rows)
    assert fitted.score_rows(outputs, rows)["micro_f1"] == 1 == task().score_rows(outputs, rows)["micro_f1"]
    (line, _) = fitted.prediction_lines(outputs, rows)
    assert (line["labels"], line["prediction"]) == (["bug", "urgent"], ["bug", "urgent"])


def test_the_constant_answer_and_one_answer_for_all() -> None:
    train = [[1, 0, 0], [1, 0, 1], [1, 1, 0]]
    assert task().majority([[1, 0, 0], [0, 0, 0]], train)["micro_f1"] == pytest.approx(2 / 3)
    assert "the same labels (bug) for every row" in task().weaknesses(np.array([[1.0, -1, -1]] * 2))[0]
    assert task().weaknesses(np.array([[1.0, -1, -1], [-1, 1, 1]])) == []


def test_names_of_the_training_rows(tmp_path: Path) -> None:
    config = replace(TOPICS, label_names=None, data_dir=str(write_lines(tmp_path, SETS)))
    assert infer_label_names(config).label_names == NAMES
    assert task_of(config).label_names == NAMES
    single = replace(config, kind="classification", label_column="stars")
    write_lines(tmp_path, [10, 9, 10], "stars")
    assert task_of(single).label_names == ("9", "10"), "numbers in their order"
    write_lines(tmp_path, [True, False, True], "stars")
    assert task_of(single).label_names == ("false", "true")
    assert columns(single, tmp_path)["label"] == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "error", "expected"),
    [
        ([0.5, 1.5, 0.5], DataError, "set task.kind=regression"),
        (["only", "only", "only"], DataError, "expected two or more classes in column 'label', found only in 3 rows"),
        (["a", "", "b"], DataError, "row 1 (counting from 0) has the label ''"),
    ],
)
def test_values_that_are_no_classes(tmp_path: Path, values: list[Any], error: Any, expected: str) -> None:
    config = TaskConfig("mail", kind="classification", data_dir=str(write_lines(tmp_path, values, "label")))
    with pytest.raises(error) as found:
        task_of(config).load(str(tmp_path), ["train"])
    assert expected in str(found.value)


def test_a_column_of_free_text_has_no_classes(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": f"comment {number}"} for number in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match="30 different values in 30 rows"):
        task_of(TaskConfig("mail", kind="classification", data_dir=str(tmp_path)))
