"""Tokens and question answering through every verb, on the bundled base and on MiniLM."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import seqeval.metrics
import torch

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.records import RunRecord
from lora_hf.inference.classify import Predictor
from lora_hf.serving.engine import Engine
from lora_hf.serving.model_process import describe
from tests.support.command_lines import ask, last_json
from tests.support.span_data import TAG_NAMES, question, start_logits_here_and_there, write_conll, write_lines

FAST = ["model.name=tiny-roberta", "model.precision=fp32", "train.warmup_steps=2", "train.batch_size=8"]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagger")
    write_conll(folder / "train.conll", 60, seed=0)
    write_conll(folder / "validation.conll", 12, seed=1)
    config = ["task.name=people", "task.kind=tokens", "task.label_names=[PER, LOC, ORG]", f"task.data_dir={folder}"]
    words = [*FAST, "task.max_length=16", "train.max_steps=16", "train.lr=5e-3", "lora.targets=all"]
    done = ask(
        "train",
        "--config",
        "ner_bert.yaml",
        *config,
        *words,
        f"output.dir={folder}",
        "output.plots=false",
        "output.name=run",
        "--json",
    )
    return Path(last_json(done)["weights"])


def test_a_tagger_is_scored_as_seqeval_scores_its_predictions(tagger: Path) -> None:
    record = RunRecord.load(tagger.parent / "record.json")
    rows = [json.loads(line) for line in (tagger.parent / "predictions-validation.jsonl").read_text().splitlines()]
    tags, predictions = [row["tags"] for row in rows], [row["predictions"] for row in rows]
    scores = record.metrics["validation"]
    assert scores["f1"] == pytest.approx(seqeval.metrics.f1_score(tags, predictions, zero_division=0))
    assert scores["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(tags, predictions))
    assert record.best["metric"] == "eval_validation_f1"
    assert record.best["value"] == pytest.approx(scores["f1"])
    scored = last_json(ask("eval", "--adapter", tagger, "--json"))  # where its run has found the rows
    assert scored["metrics"]["validation"] == pytest.approx(scores)


def test_a_tagger_answers_with_spans_of_the_text(tagger: Path, tmp_path: Path) -> None:
    text = "Tom Brandt, of Acme Corp, moved to New York (not Oslo). " * 3
    (answer,) = last_json(ask("predict", "--adapter", tagger, "--text", text, "--json"))["predictions"]
    assert answer["text"] == text
    assert answer["spans"], "the tiny base learns capital letters in a few steps"
    for span in answer["spans"]:
        assert text[span["start"] : span["end"]] == span["text"]
        assert span["type"] in TAG_NAMES
        assert 0 < span["score"] <= 1
    assert max(span["end"] for span in answer["spans"]) > len(text) / 2, "a long text is read to its end"
    write_lines(tmp_path / "in.jsonl", [{"tokens": text.split()}, {"tokens": ["Oslo"]}])
    rows = last_json(ask("predict", "--adapter", tagger, "--input", tmp_path / "in.jsonl", "--json"))["predictions"]
    assert [row["text"] for row in rows] == [text.strip(), "Oslo"]
    (tmp_path / "in.conll").write_text("Oslo\n\nTom\nBrandt\n")
    rows = last_json(ask("predict", "--adapter", tagger, "--input", tmp_path / "in.conll", "--json"))["predictions"]
    assert [row["text"] for row in rows] == ["Oslo", "Tom Brandt"]


def test_a_served_tagger_gives_the_same_answers(tagger: Path) -> None:
    texts = ["Tom Brandt moved to Oslo.", "Anna Meier, of Globex, met Li Wei in New York and in Rio de Janeiro. " * 2]
    expected = Predictor.load(find_saved_model(tagger), "fp32").predict({"text": texts})
    with Engine(precision="fp32") as engine:
        engine.load("people", tagger)
        result = engine.classify("people", texts)
    assert [[span["text"] for span in answer["spans"]] for answer in result.answers] == [
        [span["text"] for span in answer["spans"]] for answer in expected
    ]
    assert result.truncated == []


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, choice = tmp_path_factory.mktemp("reader"), random.Random(0)
    write_lines(folder / "train.jsonl", [question(choice, answered=bool(index % 4)) for index in range(60)])
    write_lines(folder / "validation.jsonl", [question(choice, 8, answered=bool(index % 3)) for index in range(12)])
    config = [
        "task.name=homes",
        "task.kind=question_answering",
        "task.null_score_threshold=0",
        f"task.data_dir={folder}",
    ]
    words = [*FAST, "task.max_length=48", "train.max_steps=16", "train.lr=5e-3", "lora.targets=all"]
    done = ask(
        "train",
        "--config",
        "squad_bert.yaml",
        *config,
        *words,
        f"output.dir={folder}",
        "output.plots=false",
        "output.name=run",
        "--json",
    )
    return Path(last_json(done)["weights"])


def test_a_reader_answers_with_a_span_of_the_context(reader: Path) -> None:
    record = RunRecord.load(reader.parent / "record.json")
    scores = record.metrics["validation"]
    assert set(scores) == {"exact_match", "f1"} | {
        f"{a}_{b}" for a in ("has_answer", "no_answer") for b in ("exact_match", "f1")
    }
    scored = last_json(ask("eval", "--adapter", reader, "--json"))
    assert scored["metrics"]["validation"] == pytest.approx(scores)
    row = question(random.Random(3), 12)
    words = ["--text", row["question"], "--text-pair", row["context"]]
    (answer,) = last_json(ask("predict", "--adapter", reader, *words, "--json"))["predictions"]
    if answer["answer"]:
        assert row["context"][answer["start"] : answer["end"]] == answer["answer"]
    else:
        assert (answer["start"], answer["end"]) == (None, None)
    assert 0 < answer["score"] <= 1


def test_a_served_reader_gives_the_same_answers(reader: Path) -> None:
    rows = [question(random.Random(seed), 4 + 4 * seed) for seed in range(3)]
    columns = {name: [row[name] for row in rows] for name in ("question", "context")}
    expected = Predictor.load(find_saved_model(reader), "fp32").predict(columns)
    with Engine(precision="fp32") as engine:
        engine.load("homes", reader)
        result = engine.classify("homes", list(zip(*columns.values(), strict=True)))
        assert describe(engine.adapters()[0])["reads"] == ["question", "context"], "the page has two boxes"
    assert [answer["answer"] for answer in result.answers] == [answer["answer"] for answer in expected]


@pytest.mark.full
def test_the_head_of_a_reader_is_kept(reader: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(find_saved_model(reader), "fp32")
    assert any("qa_outputs" in name for name, _ in predictor.model.named_parameters())
    here, there = start_logits_here_and_there(reader, tmp_path)
    assert torch.equal(there, here)
    assert np.ptp(here.numpy()) > 0
