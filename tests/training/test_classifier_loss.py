"""Weights of classes equal scikit-learn's, and the loss equals torch's and the models' own."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss
from transformers import BertConfig, BertForSequenceClassification

from lora_hf.core.config.schema import RunConfig, TaskConfig, TrainConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.base import ProblemType
from lora_hf.data.tasks.classification import TextClassification
from lora_hf.data.tasks.registry import task_of
from lora_hf.training.classifier_loss import class_weights, classifier_loss, configured_loss
from lora_hf.training.validation import check_run

NAMES = ("a", "b", "c")
MAIL = TaskConfig("mail", kind="classification", label_names=NAMES)
LABELS = [0] * 30 + [1] * 9 + [2] * 1


def rows(labels: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": ["x"] * len(labels), "label": labels})


def weights_of(config: TaskConfig, labels: list[Any], chosen: Any) -> torch.Tensor:
    task = cast(TextClassification, task_of(config))
    weights = class_weights(task, chosen, task.count_classes(rows(labels)), len(labels))
    assert weights is not None
    return weights


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(LABELS))
    assert weights_of(MAIL, LABELS, "balanced").tolist() == pytest.approx(expected.tolist())
    without = compute_class_weight("balanced", classes=np.arange(2), y=np.array(LABELS[:39]))
    assert weights_of(MAIL, LABELS[:39], "balanced").tolist() == pytest.approx([*without.tolist(), 1.0])
    assert weights_of(MAIL, LABELS, {"c": 5.0}).tolist() == [1, 1, 5]


def test_balanced_weights_of_several_labels() -> None:
    topics = replace(MAIL, kind="multi_label")
    assert weights_of(topics, [[1, 0, 0]] * 3 + [[1, 1, 0]], "balanced").tolist() == [1, 3, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_label_a_row(smoothing: float) -> None:
    logits, labels, weights = torch.randn(8, 3), torch.arange(8) % 3, torch.tensor([0.5, 1.0, 4.0])
    found = classifier_loss(logits, labels, "single_label_classification", weights, smoothing)
    torch.testing.assert_close(found, CrossEntropyLoss(weights, label_smoothing=smoothing)(logits, labels))


def test_several_labels_a_row() -> None:
    logits, labels, weights = torch.randn(8, 3), (torch.rand(8, 3) > 0.5).float(), torch.tensor([0.5, 1.0, 4.0])
    found = classifier_loss(logits, labels, "multi_label_classification", weights, 0.1)
    torch.testing.assert_close(found, BCEWithLogitsLoss(pos_weight=weights)(logits, labels * 0.9 + 0.05))


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 1, 2])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 1, 0]])),
        ("regression", torch.tensor([0.5, 1.0, -2.0])),
    ],
)
def test_the_plain_loss_is_the_models(problem_type: ProblemType, labels: torch.Tensor) -> None:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20,
        num_labels=1 if problem_type == "regression" else 3, problem_type=problem_type,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    output = model(input_ids=torch.tensor([[1, 2], [3, 4], [5, 6]]), labels=labels)
    torch.testing.assert_close(classifier_loss(output.logits, labels, problem_type), output.loss)


def test_when_the_models_own_loss_stays(caplog: pytest.LogCaptureFixture) -> None:
    even = rows([0, 1, 2] * 4)
    for config in (MAIL, replace(MAIL, kind="multi_label"), TaskConfig("score", kind="regression")):
        part = rows([[1, 0, 0], [0, 1, 1]]) if config.kind == "multi_label" else even
        assert configured_loss(task_of(config), TrainConfig(), part) is None
    assert configured_loss(task_of(MAIL), TrainConfig(label_smoothing=0.1), even) is None, "the Trainer's"
    assert configured_loss(task_of(MAIL), TrainConfig(class_weights="balanced"), even) is not None
    assert not caplog.records


def test_skew_is_said_with_its_remedy(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        configured_loss(task_of(MAIL), TrainConfig(), rows(LABELS))
    (text,) = caplog.messages
    assert "30 training rows have 'a', and 1 have 'c'" in text
    assert "train.class_weights=balanced" in text
    assert "task.metric=macro_f1" in text
    caplog.clear()
    configured_loss(task_of(MAIL), TrainConfig(class_weights="balanced"), rows(LABELS))
    assert not caplog.records


@pytest.mark.parametrize(
    ("task", "train", "expected"),
    [
        (MAIL, {"class_weights": {"d": 2.0}}, "no class 'd'; expected a, b, c"),
        (TaskConfig("score", kind="regression"), {"class_weights": "balanced"}, "score has no classes"),
        (TaskConfig("score", kind="regression"), {"label_smoothing": 0.1}, "score has no classes"),
    ],
)
def test_weights_of_classes_that_are_not_there(task: TaskConfig, train: dict[str, Any], expected: str) -> None:
    config = RunConfig.from_dict({"model": {"name": "tiny-roberta"}})
    with pytest.raises(ConfigError, match=expected):
        check_run(replace(config, task=task, train=TrainConfig(**train)))
