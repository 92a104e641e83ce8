"""MiniLM on a thousand CoNLL rows and on questions made by rule, against seqeval and PEFT with the Trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import seqeval.metrics
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.records import RunRecord
from tests.support.command_lines import ask, last_json
from tests.support.span_data import TAG_NAMES, question, start_logits_here_and_there, write_conll, write_lines

pytestmark = pytest.mark.full

SETTINGS = {"epochs": 2, "batch": 16, "lr": 2e-3, "seed": 3, "r": 8, "alpha": 16}


def read_conll(file: Path) -> list[tuple[list[str], list[str]]]:
    """The tokens and tags of each row."""
    blocks = file.read_text().replace("-DOCSTART- -X- -X- O\n\n", "").strip().split("\n\n")
    cells = [[line.split() for line in block.splitlines()] for block in blocks]
    return [([cell[0] for cell in block], [cell[-1] for cell in block]) for block in cells]


def with_peft(base: Path, folder: Path, names: list[str]) -> float:
    """F1 of PEFT and the Trainer, aligned as in the token classification example of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(base)

    def encode(file: Path) -> list[dict[str, Any]]:
        rows = []
        for tokens, tags in read_conll(file):
            row = tokenizer(tokens, is_split_into_words=True, truncation=True, max_length=64)
            words = row.word_ids()
            firsts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            labels = [names.index(tags[word]) if first else -100 for word, first in zip(words, firsts, strict=True)]
            rows.append({**row, "labels": labels})
        return rows

    set_seed(SETTINGS["seed"])
    model: Any = AutoModelForTokenClassification.from_pretrained(base, num_labels=len(names))
    config = peft.LoraConfig(
        task_type="TOKEN_CLS", r=SETTINGS["r"], lora_alpha=SETTINGS["alpha"], target_modules=["query", "value"]
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "peft"),
        num_train_epochs=SETTINGS["epochs"],
        per_device_train_batch_size=SETTINGS["batch"],
        learning_rate=SETTINGS["lr"],
        warmup_steps=0.06,
        seed=SETTINGS["seed"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForTokenClassification(tokenizer)
    trainer = Trainer(
        peft.get_peft_model(model, config),
        arguments,
        data_collator=collator,
        train_dataset=encode(folder / "train.conll"),  # type: ignore[arg-type]
    )
    trainer.train()
    outcome = trainer.predict(encode(folder / "validation.conll"))  # type: ignore[arg-type]
    tags, predictions = [], []
    for labels, logits in zip(outcome.label_ids, outcome.predictions, strict=True):
        kept = labels != -100
        tags.append([names[label] for label in labels[kept]])
        predictions.append([names[label] for label in logits[kept].argmax(-1)])
    return float(seqeval.metrics.f1_score(tags, predictions))


def test_a_tagger_equals_seqeval_and_peft(real_models: Path, tmp_path: Path) -> None:
    write_conll(tmp_path / "train.conll", 400, seed=0)
    write_conll(tmp_path / "validation.conll", 100, seed=1)
    options = {
        "model.name": real_models / "minilm", "model.precision": "fp32", "task.data_dir": tmp_path,
        "task.label_names": f"[{', '.join(TAG_NAMES)}]", "task.max_length": 64, "output.dir": tmp_path,
        "lora.targets": "[q, v]", "lora.r": SETTINGS["r"], "lora.lora_alpha": SETTINGS["alpha"],
        "train.epochs": SETTINGS["epochs"], "train.batch_size": SETTINGS["batch"], "train.lr": SETTINGS["lr"],
        "train.seed": SETTINGS["seed"], "train.weight_decay": 0,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in options.items()]
    run = Path(last_json(ask("train", "--config", "ner_bert.yaml", *words, "--json"))["run"])
    scores = RunRecord.load(run / "record.json").metrics["validation"]
    rows = [json.loads(line) for line in (run / "predictions-validation.jsonl").read_text().splitlines()]
    assert [row["tags"] for row in rows] == [tags for _, tags in read_conll(tmp_path / "validation.conll")]
    found = seqeval.metrics.f1_score([row["tags"] for row in rows], [row["predictions"] for row in rows])
    assert scores["f1"] == pytest.approx(float(found))
    assert scores["f1"] > 0.9
    task = find_saved_model(run / "adapter").task
    assert scores["f1"] == pytest.approx(with_peft(real_models / "minilm", tmp_path, list(task.label_names)), abs=0.005)


def test_a_reader_on_bert_learns_and_keeps_its_head(real_models: Path, tmp_path: Path) -> None:

    choice = random.Random(0)
    write_lines(tmp_path / "train.jsonl", [question(choice) for _ in range(240)])
    write_lines(tmp_path / "validation.jsonl", [question(choice, 12) for _ in range(40)])
    options = [f"model.name={real_models / 'minilm'}", "model.precision=fp32", f"task.data_dir={tmp_path}"]
    options += ["task.max_length=64", "task.stride=24", "train.lr=2e-3", "train.batch_size=16", "train.epochs=2"]
    done = last_json(
        ask("train", "--config", "squad_bert.yaml", *options, f"output.dir={tmp_path}", "output.plots=false", "--json")
    )
    assert RunRecord.load(Path(done["run"]) / "record.json").metrics["validation"]["exact_match"] > 0.8
    here, there = start_logits_here_and_there(Path(done["weights"]), tmp_path)
    assert torch.equal(there, here)
    assert np.ptp(here.numpy()) > 1
