"""The GLUE table against the real rows and the real RoBERTa tokenizer, where both are there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from lora_hf.core.errors import ConfigError, DataError, TrainingError
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.glue import GLUE
from lora_hf.data.tasks.registry import get_task, task_names

GLUE_NAMES = tuple(task.name for task in GLUE)
BOS, EOS = 0, 2  # RoBERTa's <s> and </s>; a pair is <s> A </s></s> B </s>

# Rows of each split, as PROVENANCE.md beside the data counts them, and the rows of each class in validation.
ROWS = {
    "cola": ({"train": 8551, "validation": 1043, "test": 1063}, [322, 721]),
    "sst2": ({"train": 67349, "validation": 872, "test": 1821}, [428, 444]),
    "mrpc": ({"train": 3668, "validation": 408, "test": 1725}, [129, 279]),
    "qqp": ({"train": 10117, "validation": 1000}, [617, 383]),
    "stsb": ({"train": 5749, "validation": 1500, "test": 1379}, None),
    "mnli": (
        {"train": 15130, "validation_matched": 9815, "validation_mismatched": 9832, "test_matched": 9796},
        [3479, 3123, 3213],
    ),
    "qnli": ({"train": 9833, "validation": 5463, "test": 5463}, [2702, 2761]),
    "rte": ({"train": 2490, "validation": 277, "test": 3000}, [146, 131]),
}
TRAIN_BALANCE = {"qnli": [4920, 4913], "qqp": [5079, 5038], "mnli": [5049, 5029, 5052]}

# The texts of the first validation row, and its label, as on the hub.
FIRST_ROW = {
    "cola": (("The sailors rode the breeze clear of the rocks.",), 1),
    "sst2": (("it 's a charming and often affecting journey . ",), 1),
    "mrpc": (
        (
            "He said the foodservice pie business doesn 't fit the company 's long-term growth strategy .",
            '" The foodservice pie business does not fit our long-term growth strategy .',
        ),
        1,
    ),
    "qqp": (("How do you say 1<x<2?", "What is the best way to say 1?"), 0),
    "stsb": (("A man with a hard hat is dancing.", "A man wearing a hard hat is dancing."), 5.0),
    "mnli": (("The new rights are nice enough", "Everyone really likes the newest benefits "), 1),
    "qnli": (
        (
            "What came into force after the new constitution was herald?",
            "As of that day, the new constitution heralding the Second Republic came into force.",
        ),
        0,
    ),
    "rte": (
        (
            (
                "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, "
                "according to the Christopher Reeve Foundation."
            ),
            "Christopher Reeve had an accident.",
        ),
        1,
    ),
}


def glue_task(name: str) -> TextClassification:
    return cast(TextClassification, get_task(name))


@pytest.fixture(scope="module")
def tokenizer(models_dir: Path) -> Any:
    from transformers import AutoTokenizer

    folder = models_dir / "roberta-base-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: put roberta-base's tokenizer files there")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", GLUE_NAMES)
def test_real_rows(name: str, data_dir: Path) -> None:
    task = glue_task(name)
    counts, balance = ROWS[name]
    splits = task.load(str(data_dir), list(counts))
    assert {split: len(rows) for split, rows in splits.items()} == counts
    validation = splits[task.evaluation_splits[0]]
    row = validation[0]
    assert (tuple(row[column] for column in task.text_columns), row["label"]) == FIRST_ROW[name]
    if balance:
        assert np.bincount(validation["label"][:]).tolist() == balance
    if name in TRAIN_BALANCE:
        assert np.bincount(splits["train"]["label"][:]).tolist() == TRAIN_BALANCE[name]


@pytest.mark.parametrize("name", GLUE_NAMES)
def test_encodes_a_real_row(name: str, tokenizer: Any) -> None:
    task = glue_task(name)
    texts, label = FIRST_ROW[name]
    rows: dict[str, list] = {column: [text] for column, text in zip(task.text_columns, texts, strict=True)}
    rows["label"] = [label]

    encoded = task.encode(rows, tokenizer, max_length=128)

    expected = [BOS]
    for position, text in enumerate(texts):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [EOS] * (position > 0) + tokens + [EOS]
    assert encoded.pop("truncated") == [False]
    assert encoded == {"input_ids": [expected], "attention_mask": [[1] * len(expected)], "labels": [label]}
    assert type(encoded["labels"][0]) is (float if name == "stsb" else int)


def test_truncates_the_longer_text_first(tokenizer: Any) -> None:
    rows = {"sentence1": ["word " * 50], "sentence2": ["short"], "label": [0]}
    encoded = glue_task("rte").encode(rows, tokenizer, max_length=12)
    (ids,) = encoded["input_ids"]
    assert encoded["truncated"] == [True]
    assert len(ids) == 12
    assert tokenizer.decode(ids).endswith("</s></s>short</s>")


def test_hidden_and_missing_labels_are_not_encoded(tokenizer: Any) -> None:
    task = glue_task("sst2")
    assert "labels" not in task.encode({"sentence": ["a", "b"], "label": [-1, -1]}, tokenizer, 16)
    assert "labels" not in task.encode({"sentence": ["a", "b"]}, tokenizer, 16)


def test_mapped_over_a_dataset(tokenizer: Any) -> None:
    task = glue_task("rule-sentiment")
    rows = task.load(None, ["validation"])["validation"]
    encoded = rows.map(lambda batch: task.encode(batch, tokenizer, 64), batched=True, remove_columns=rows.column_names)
    assert sorted(encoded.column_names) == ["attention_mask", "input_ids", "labels", "truncated"]
    assert encoded["labels"][:] == rows["label"][:]


def test_the_table() -> None:
    assert task_names()[:8] == ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
    assert {task.name: task.num_labels for task in GLUE} == dict.fromkeys(GLUE_NAMES, 2) | {"mnli": 3, "stsb": 1}
    assert glue_task("mnli").label_names == ("entailment", "neutral", "contradiction")
    assert glue_task("mnli").evaluation_splits == ("validation_matched", "validation_mismatched")
    assert glue_task("qnli").label_names == glue_task("rte").label_names == ("entailment", "not_entailment")
    assert [task.name for task in GLUE if task.problem_type == "regression"] == ["stsb"]
    assert {task.name: task.best_metric for task in GLUE} == dict.fromkeys(GLUE_NAMES, "accuracy") | {
        "cola": "matthews_correlation",
        "stsb": "pearson",
    }


@pytest.mark.parametrize("name", [*GLUE_NAMES, "rule-sentiment"])
def test_scores_logits(name: str) -> None:
    task = glue_task(name)
    labels = np.array([0, 1, 1, 0, 1])
    logits = labels[:, None] * 2.0 - 1 if task.num_labels == 1 else np.eye(task.num_labels)[labels] * 3.0
    scores = task.score(logits, labels)
    assert scores[task.best_metric] == pytest.approx(1.0)
    assert task.score(-logits, labels)[task.best_metric] < 0.5


def test_majority_is_the_training_set_s() -> None:
    assert get_task("sst2").majority([0, 0, 0, 1]) == {"accuracy": 0.75}
    assert get_task("sst2").majority([0, 0, 0, 1], train_labels=[1, 1, 0]) == {"accuracy": 0.25}
    assert get_task("cola").majority([0, 0, 0, 1]) == {"matthews_correlation": 0.0}
    assert get_task("stsb").majority([0.5, 4.0, 2.0]) == {"pearson": 0.0, "spearmanr": 0.0}


def test_hidden_labels_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"rte: 2 of 2 labels are hidden \(-1\).*score one of validation"):
        get_task("rte").score(np.zeros((2, 2)), [-1, -1])


@pytest.mark.parametrize(("name", "width"), [("rte", 2), ("stsb", 1)])
def test_logits_that_are_not_finite_are_refused(name: str, width: int) -> None:
    logits = np.zeros((4, width))
    logits[2, 0] = np.nan
    with pytest.raises(TrainingError, match=rf"{name}: the logits of 1 of 4 rows are not finite, the first is row 2 "):
        get_task(name).score(logits, np.zeros(4))


def test_names() -> None:
    assert get_task("glue/sst2") is get_task("sst2")
    with pytest.raises(ConfigError) as error:
        get_task("SST-2")
    known = ", ".join(task_names())
    assert str(error.value).startswith(f"task.name: unknown task 'SST-2' (did you mean 'sst2'?); known: {known}; ")
    with pytest.raises(ConfigError, match="unknown task 'glue/rule-sentiment'"):
        get_task("glue/rule-sentiment")


def test_the_table_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    code = f"import sys, lora_hf.data.tasks.registry; print(*{heavy} & sys.modules.keys())"
    repository = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=repository, capture_output=True, text=True)
    assert done.stdout.strip() == ""
