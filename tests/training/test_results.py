"""What is said of answers that were made by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from lora_hf.core.records import RunRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.training.results import score_outputs

LABELS = [0, 1, 1, 1]


def scored(name: str, answers: dict[str, np.ndarray], labels: list, folder: Path, of: str = "") -> RunRecord:
    record = RunRecord(task=name, method="lora", model="m", config={}, seed=0, started="2026-01-01T00:00:00")
    rows = {split: Dataset.from_dict({"label": labels}) for split in ("train", *answers)}
    score_outputs(record, get_task(name), answers, rows, folder, of)
    return record


def test_scores_stand_beside_the_commonest_answer_and_every_answer_is_kept(tmp_path: Path) -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.5, 1.0000004], [-1.0, 1.0]], dtype=np.float32)
    record = scored("rule-sentiment", {"validation": logits}, LABELS, tmp_path)
    assert record.metrics == {"validation": {"accuracy": 1.0}}
    assert record.majority == {"validation": {"accuracy": 0.75}}
    assert record.warnings == []
    lines = [json.loads(line) for line in (tmp_path / "predictions-validation.jsonl").read_text().splitlines()]
    assert [(line["row"], line["label"], line["prediction"]) for line in lines] == [
        (0, 0, 0),
        (1, 1, 1),
        (2, 1, 1),
        (3, 1, 1),
    ]
    assert lines[2]["logits"] == [0.5, 1.0]


def test_one_class_for_all_is_told_aloud_once_for_each_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    answers = {split: np.array([[0.0, 1.0]] * 4) for split in ("validation_matched", "validation_mismatched")}
    record = scored("rule-sentiment", answers, LABELS, tmp_path)
    assert len(record.warnings) == 4
    for split, (collapsed, useless) in zip(answers, (record.warnings[:2], record.warnings[2:]), strict=True):
        assert collapsed.startswith(f"{split}: ")
        assert "'positive'" in collapsed
        assert useless.startswith(f"{split}: accuracy 0.7500 is no better than")
        assert "(0.7500)" in useless
    assert [
        entry.getMessage() for entry in caplog.records if entry.name == "lora_hf.training.results"
    ] == record.warnings


def test_of_several_runs_a_warning_says_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = scored("rule-sentiment", {"validation": np.array([[0.0, 1.0]] * 4)}, LABELS, tmp_path, "second, ")
    told = [entry.getMessage() for entry in caplog.records if entry.name == "lora_hf.training.results"]
    assert told == [f"second, {warning}" for warning in record.warnings]
    assert len(told) == 2


def test_a_regression_has_no_class_to_collapse_to(tmp_path: Path) -> None:
    record = scored("stsb", {"validation": np.array([[0.5], [2.0], [2.5]])}, [0.0, 5.0, 2.5], tmp_path)
    assert record.warnings == []
    assert record.metrics["validation"]["spearmanr"] == pytest.approx(0.5)
    lines = [json.loads(line) for line in (tmp_path / "predictions-validation.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [0.5, 2.0, 2.5]
