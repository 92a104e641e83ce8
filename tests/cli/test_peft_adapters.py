"""PEFT records no task: the commands infer it from the adapter's task_type, its head and its base."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from lora_hf.core.records import MERGE_FILE, MergeRecord
from lora_hf.models.load import BUNDLED_FOLDER
from lora_hf.serving.engine import Engine
from tests.support.chats import save_chat_model
from tests.support.command_lines import ask, last_json
from tests.support.span_data import question, save_encoder_decoder, write_lines
from tests.tolerances import MERGE_FP32

IDS = torch.tensor([[5, 6, 7, 8]])
TEXTS = ["a warm film", "a dull film without an idea"]
CLASSES: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "CAUSAL_LM": AutoModelForCausalLM,
}


def base_folder(folder: Path, name: str = "tiny-roberta", **config: Any) -> Path:
    """A copy of a bundled base with further values in its config.json."""
    base = shutil.copytree(BUNDLED_FOLDER / name, folder / "base")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | config))
    return base


@torch.no_grad()
def save_peft(base: Path, task_type: str, targets: list[str], **head: Any) -> tuple[Path, Any]:
    """An adapter that PEFT has saved, with random values in B, and PEFT's model."""
    torch.manual_seed(0)
    fused = targets == ["c_attn"]
    config = peft.LoraConfig(task_type=task_type, r=4, target_modules=targets, fan_in_fan_out=fused)
    model = peft.get_peft_model(CLASSES[task_type].from_pretrained(base, **head), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = base.parent / "adapter"
    model.save_pretrained(adapter)
    return adapter, model


@torch.no_grad()
@pytest.mark.parametrize(
    "labels", [None, pytest.param(1, marks=pytest.mark.full), 2, pytest.param(5, marks=pytest.mark.full)]
)
def test_merging_gives_their_logits(labels: int | None, tmp_path: Path) -> None:
    causal = labels is None
    base = base_folder(tmp_path, "tiny-gpt2" if causal else "tiny-roberta")
    adapter, theirs = (
        save_peft(base, "CAUSAL_LM", ["c_attn"])
        if causal
        else save_peft(base, "SEQ_CLS", ["query", "value"], num_labels=labels)
    )
    said = ask("merge", "--adapter", adapter, "--output", tmp_path / "merged").stderr
    assert "records no tokenizer" in said
    merged = CLASSES["CAUSAL_LM" if causal else "SEQ_CLS"].from_pretrained(tmp_path / "merged").eval()
    if not causal:
        assert merged.config.num_labels == labels
    assert torch.allclose(merged(IDS).logits, theirs(IDS).logits, atol=MERGE_FP32)
    assert MergeRecord.load(tmp_path / "merged" / MERGE_FILE).task == "unrecorded"
    verb, option, key = ("generate", "--prompt", "texts") if causal else ("predict", "--text", "predictions")
    answers = [
        last_json(ask(verb, "--adapter", folder, option, "The", "--json"))[key]
        for folder in (adapter, tmp_path / "merged")
    ]
    assert str(answers[0])[:40] == str(answers[1])[:40], "the merged model answers as the adapter does"


@pytest.mark.parametrize(
    ("labels", "named", "expected"),
    [
        (3, None, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (3, ["bad", "fair", "good"], ["bad", "fair", "good"]),
        (3, ["of another", "head"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
@torch.no_grad()
def test_a_classifier_is_predicted_and_served(
    labels: int, named: list[str] | None, expected: list[str], tmp_path: Path
) -> None:
    base = base_folder(tmp_path, id2label=dict(enumerate(named)) if named else None)
    adapter, theirs = save_peft(base, "SEQ_CLS", ["query"], num_labels=labels)
    done = ask("predict", "--adapter", adapter, "--text", TEXTS[0], "--text", TEXTS[1], "--json")
    inferred = [line for line in done.stderr.splitlines() if "SEQ_CLS" in line]
    assert len(inferred) == 1
    assert f"classification with the labels {', '.join(expected)}" in inferred[0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = last_json(done)["predictions"]
    for text, answer in zip(TEXTS, answers, strict=True):
        probabilities = theirs(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
        assert list(answer["probabilities"]) == expected
        assert list(answer["probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=1e-3)
    with Engine(precision="fp32") as engine:
        engine.load("theirs", adapter)
        assert [each["label"] for each in engine.classify("theirs", TEXTS).answers] == [
            each["label"] for each in answers
        ]


def test_several_labels_and_one_number(tmp_path: Path) -> None:
    several = base_folder(tmp_path / "several", problem_type="multi_label_classification")
    adapter, _ = save_peft(several, "SEQ_CLS", ["query"], num_labels=3)
    (answer,) = last_json(ask("predict", "--adapter", adapter, "--text", "x", "--json"))["predictions"]
    assert isinstance(answer["labels"], list)
    adapter, _ = save_peft(base_folder(tmp_path / "one"), "SEQ_CLS", ["query"], num_labels=1)
    (answer,) = last_json(ask("predict", "--adapter", adapter, "--text", "x", "--json"))["predictions"]
    assert isinstance(answer["score"], float)


@torch.no_grad()
def test_a_causal_model_continues_the_prompt_as_it_is(tmp_path: Path) -> None:
    adapter, theirs = save_peft(base_folder(tmp_path, "tiny-gpt2"), "CAUSAL_LM", ["c_attn"])
    done = ask("generate", "--adapter", adapter, "--prompt", "The pub", "--max-new-tokens", "8", "--json")
    assert "a text that the model continues" in done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = tokenizer("The pub", return_tensors="pt")
    output = theirs.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert last_json(done)["texts"][0]["text"] == expected
    with Engine(precision="fp32") as engine:
        engine.load("theirs", adapter)
        assert engine.generate("theirs", "The pub", max_new_tokens=8).text == expected


@torch.no_grad()
def test_a_causal_model_with_a_template_chats(tmp_path: Path) -> None:
    adapter, theirs = save_peft(save_chat_model(tmp_path / "base"), "CAUSAL_LM", ["q_proj", "v_proj"])
    done = ask("generate", "--adapter", adapter, "--prompt", "Hello", "--max-new-tokens", "6", "--json")
    assert "its base: chat." in done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    turns = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = theirs.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert last_json(done)["texts"][0]["text"] == expected


def test_other_heads(tmp_path: Path) -> None:
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    adapter, _ = save_peft(base_folder(tmp_path / "tags", id2label=names), "TOKEN_CLS", ["query"])
    (answer,) = last_json(ask("predict", "--adapter", adapter, "--text", "Tom Brandt", "--json"))["predictions"]
    assert {span["type"] for span in answer["spans"]} <= {"PER"}
    adapter, _ = save_peft(base_folder(tmp_path / "words"), "TOKEN_CLS", ["query"], num_labels=3)
    (answer,) = last_json(ask("predict", "--adapter", adapter, "--text", "Tom Brandt", "--json"))["predictions"]
    assert {span["type"] for span in answer["spans"]} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    adapter, _ = save_peft(base_folder(tmp_path / "answers"), "QUESTION_ANS", ["query"])
    row = question(random.Random(0))
    words = ["--text", row["question"], "--text-pair", row["context"], "--json"]
    (answer,) = last_json(ask("predict", "--adapter", adapter, *words))["predictions"]
    assert answer["answer"] in row["context"]
    (tmp_path / "t5").mkdir()
    adapter, _ = save_peft(save_encoder_decoder(tmp_path / "t5" / "base", "t5"), "SEQ_2_SEQ_LM", ["q", "v"])
    (text,) = last_json(ask("generate", "--adapter", adapter, "--prompt", "w1 w2", "--json"))["texts"]
    assert text["prompt"] == "w1 w2"


def test_their_own_rows_are_scored(tmp_path: Path) -> None:
    adapter, _ = save_peft(base_folder(tmp_path), "SEQ_CLS", ["query"], num_labels=2)
    rows = [{"text": text, "label": index} for index, text in enumerate(TEXTS)]
    write_lines(tmp_path / "data" / "validation.jsonl", rows)
    scores = last_json(ask("eval", "--adapter", adapter, "--data-dir", tmp_path / "data", "--json"))["metrics"]
    assert scores["validation"]["accuracy"] in (0.0, 0.5, 1.0)


def test_a_config_beside_the_adapter_tells_another_task(tmp_path: Path) -> None:
    adapter, _ = save_peft(base_folder(tmp_path), "SEQ_CLS", ["query"], num_labels=2)
    (adapter / "config.yaml").write_text("task: {name: rte, max_length: 32}")
    words = ["--text", "It rains.", "--text-pair", "It is wet.", "--json"]
    done = ask("predict", "--adapter", adapter, *words)
    assert last_json(done)["predictions"][0]["label"] in ("entailment", "not_entailment")
    assert "records no task" not in done.stderr


def test_a_head_that_no_task_has_is_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    adapter, _ = save_peft(base, "SEQ_CLS", ["query"])
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(values | {"task_type": "FEATURE_EXTRACTION"}))
    said = ask("merge", "--adapter", adapter, "--output", tmp_path / "merged", code=2).stderr
    assert "FEATURE_EXTRACTION" in said
