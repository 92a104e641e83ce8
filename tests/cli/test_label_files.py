"""The verbs on rows with several labels, and what `eval` and `predict` write beside the metrics and the answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from sklearn.metrics import f1_score, precision_recall_fscore_support

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.records import RunRecord
from lora_hf.serving.engine import Engine
from tests.data.test_user_files import write_rows
from tests.support.command_lines import ask, last_json
from tests.support.split_files import write_text
from tools.benchmark.label_rows import LABELS, label_rows

TEXT = "Hello, order 7: the router restarts, and the invoice is wrong."


def train(folder: Path, *words: str) -> Any:
    config = write_text(folder / "config.yaml", "model: {name: tiny-roberta, precision: fp32}\ntrain: {lr: 2e-3}\n")
    settings = [f"task.data_dir={folder}", "task.max_length=48", f"output.dir={folder}", "output.name=run"]
    return ask("train", "--config", config, *settings, *words)


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topics")
    write_rows(folder / "train.jsonl", label_rows(200))
    words = ("task.name=topics", "task.kind=multi_label", "task.validation=0.25", "train.max_steps=12")
    done = train(folder, *words, "train.class_weights=balanced", "train.label_smoothing=0.05")
    assert f"task.label_names, from the rows of {folder}/train.jsonl: {', '.join(sorted(LABELS))}" in done.stderr
    return folder


@pytest.fixture(scope="module")
def mail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mail")
    rows = [
        {"text": row["text"], "label": "network" if "network" in row["labels"] else "other"} for row in label_rows(80)
    ]
    write_rows(folder / "train.csv", rows)
    train(folder, "task.name=mail", "task.kind=classification", "task.validation=0.25", "train.max_steps=4")
    return folder


@pytest.mark.full
def test_the_thresholds_lie_with_the_adapter(topics: Path) -> None:
    record = RunRecord.load(topics / "run" / "record.json")
    classes = record.evaluation["validation"]["classes"]
    for file in ("config.yaml", "adapter/config.yaml"):
        task = yaml.safe_load((topics / "run" / file).read_text())["task"]
        assert task["label_names"] == sorted(LABELS)
        assert dict(zip(task["label_names"], task["thresholds"], strict=True)) == {
            name: scores["threshold"] for name, scores in classes.items()
        }
    assert record.config["task"]["thresholds"] is None, "runs with other thresholds have the same recipe"
    assert record.rows == {"train": 150, "validation": 50}
    lines = [json.loads(line) for line in (topics / "run" / "predictions-validation.jsonl").read_text().splitlines()]
    labels, predicted = (
        [[name in line[key] for name in sorted(LABELS)] for line in lines] for key in ("labels", "prediction")
    )
    assert record.metrics["validation"]["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))


def test_eval_repeats_the_run(topics: Path, tmp_path: Path) -> None:
    record = RunRecord.load(topics / "run" / "record.json")
    words = ["--adapter", topics / "run" / "adapter", "--data-dir", topics]
    found = last_json(ask("eval", *words, "--json", "--plots", tmp_path / "plots"))
    assert found["metrics"]["validation"] == pytest.approx(record.metrics["validation"], abs=1e-6)
    scores = found["evaluation"]["validation"]
    assert scores["confusion"] == record.evaluation["validation"]["confusion"]
    assert len(scores["mistakes"]) <= 20
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "confusion-validation.png", "reliability-validation.png",
    }  # fmt: skip
    printed = ask("eval", *words).stdout
    assert "expected calibration error" in printed
    assert all(name in printed for name in LABELS)


def test_answers_are_the_same_from_text_file_python_and_server(topics: Path, tmp_path: Path) -> None:
    adapter = topics / "run" / "adapter"
    (answer,) = last_json(ask("predict", "--adapter", adapter, "--text", TEXT, "--json"))["predictions"]
    assert set(answer["labels"]) == {
        name
        for name, threshold in zip(sorted(LABELS), find_saved_model(adapter).task.thresholds, strict=True)  # type: ignore[attr-defined]
        if answer["probabilities"][name] >= threshold
    }
    path = write_rows(tmp_path / "in.csv", [{"text": TEXT, "labels": "x"}])
    ask("predict", "--adapter", adapter, "--input", path, "--output", tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["labels"], row["labels_predicted"]) == ("x", answer["labels"])
    assert row["probability_network"] == pytest.approx(answer["probabilities"]["network"], abs=1e-3)
    engine = Engine(precision="fp32")
    try:
        engine.load("topics", adapter)
        (served,) = engine.wait(engine.submit_classify("topics", [TEXT])).answers
    finally:
        engine.close()
    assert served["labels"] == answer["labels"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predict_keeps_rows_and_columns(mail: Path, tmp_path: Path, suffix: str) -> None:
    given = [{"id": f"00{n}", "text": row["text"], "label": "?"} for n, row in enumerate(label_rows(9, seed=1))]
    path, output = write_rows(tmp_path / f"in{suffix}", given), tmp_path / "out.csv"
    done = ask("predict", "--adapter", mail / "run" / "adapter", "--input", path, "--output", output)
    assert "the input has columns called label, which are kept; the predictions are in label_predicted" in done.stderr
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: row[key] for key in given[0]} for row in rows] == given
    for row in rows:
        probabilities = {name: float(row[f"probability_{name}"]) for name in ("network", "other")}
        assert row["label_predicted"] == max(probabilities, key=lambda name: probabilities[name])
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-3)


def test_the_run_shows_scores_by_class(mail: Path, tmp_path: Path) -> None:
    record = RunRecord.load(mail / "run" / "record.json")
    lines = [json.loads(line) for line in (mail / "run" / "predictions-validation.jsonl").read_text().splitlines()]
    labels, predicted = ([line[key] for line in lines] for key in ("label", "prediction"))
    recall = precision_recall_fscore_support(labels, predicted, zero_division=0)[1]
    classes = record.evaluation["validation"]["classes"]
    assert [classes[name]["recall"] for name in ("network", "other")] == pytest.approx(recall)
    for name in ("confusion", "reliability"):
        assert (mail / "run" / f"{name}-validation.png").read_bytes().startswith(b"\x89PNG")
    ask("compare", mail / "run", "--output", tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "### Scores by class" in report
    assert "### Calibration" in report


def test_runs_with_several_labels_are_compared(topics: Path, tmp_path: Path) -> None:
    ask("compare", topics / "run", "--output", tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "### Most confident mistakes" in report
    assert all(name in report for name in LABELS)


def test_max_train_rows(tmp_path: Path) -> None:
    config = write_text(tmp_path / "config.yaml", "task: {name: rule-sentiment}\nmodel: {name: tiny-roberta}\n")
    words = ["train.max_steps=1", f"output.dir={tmp_path}", "output.name=run"]
    ask("train", "--config", config, "--max-train-rows", "40", *words)
    assert RunRecord.load(tmp_path / "run" / "record.json").rows == {"train": 40, "validation": 500}
