"""The new head of a regression starts at the mean of the labels; no other head moves."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lora_hf import inject
from lora_hf.core.config.schema import LoraConfig, RunConfig
from lora_hf.data.tasks.registry import get_task
from lora_hf.training.regression_head import center_new_head
from lora_hf.training.run import train
from tests.support.small_models import small_model

LABELS = Dataset.from_dict({"labels": [1.0, 2.5, 5.0]})  # their mean is 17/6
STSB = get_task("stsb")


def loaded(folder: Path, kind: str, labels_of_checkpoint: int | None = None) -> PreTrainedModel:
    """A model with one output, loaded from a checkpoint of the bare base or with a head."""
    saved = small_model(kind, labels_of_checkpoint or 2)
    (saved if labels_of_checkpoint else saved.base_model).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("is_adapted", [True, False])
def test_a_new_head_starts_at_the_mean(kind: str, is_adapted: bool, tmp_path: Path) -> None:
    model = loaded(tmp_path, kind)
    if is_adapted:
        inject(model, LoraConfig(r=2, targets=("q",)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    centered = center_new_head(model, STSB, LABELS)
    assert centered is not None
    assert centered.requires_grad
    assert centered.item() == pytest.approx(17 / 6)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) == 1
    assert ("modules_to_save.default" in changed[0]) == is_adapted, "the base keeps its own head"


def test_heads_that_must_not_move(tmp_path: Path) -> None:
    filled = loaded(tmp_path / "filled", "bert", labels_of_checkpoint=1)
    assert center_new_head(filled, STSB, LABELS) is None, "the checkpoint has trained it"
    assert center_new_head(loaded(tmp_path / "llama", "llama"), STSB, LABELS) is None, "it has no bias"
    new = loaded(tmp_path / "bert", "bert")
    assert center_new_head(new, get_task("rte"), LABELS) is None, "class ids have no mean"
    assert not new.classifier.bias.any()


def test_a_run_trains_from_the_mean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"text {n},{100 + n}\n" for n in range(8)))
    (tmp_path / "validation.csv").write_text("text,label\ntext,103\n")
    config = RunConfig.from_dict(
        {
            "model": {"name": "tiny-roberta"},
            "task": {"name": "score", "kind": "regression", "data_dir": str(tmp_path)},
            "lora": {"r": 2, "targets": ["q"]},
            "train": {"max_steps": 1, "lr": 1e-5},
            "output": {"dir": str(tmp_path), "plots": False, "name": "run"},
        }
    )
    caplog.set_level(logging.INFO, "lora_hf")
    run = train(config)
    assert "starts at the mean of the training labels, 103.5" in caplog.text
    assert run.record.history[0]["loss"] < 10, "from zero it is about 10,700"
