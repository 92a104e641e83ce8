"""A step of several runs in one batch gives each adapter the gradients of its own step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_hf import inject, load_adapter, save_adapter, set_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.tasks.registry import get_task
from lora_hf.models.load import DROPOUTS
from lora_hf.training.joint_batch import RunBatch, add_gradients
from lora_hf.training.trainer import enable_optimizations
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import JOINT_GRADIENT

# Adapters of different ranks, alphas and targets; the tasks have 2, 1 (a regression) and 3 labels.
LORA = {
    "run000": LoraConfig(r=2, targets=("all",)),
    "run001": LoraConfig(r=4, lora_alpha=3, targets=("q", "v")),
    "run002": LoraConfig(r=1, targets=("ffn_down",)),
}
TASKS = {"run000": "mrpc", "run001": "stsb", "run002": "mnli"}
WITHOUT_DROPOUT: dict[str, Any] = dict.fromkeys(DROPOUTS, 0.0)
LENGTHS = {"run000": (7, 3, 2), "run001": (5, 6), "run002": (4,)}


def adapted(kind: str, folder: Path) -> PreTrainedModel:
    """A base with an adapter for each run, all trainable."""
    task = {name: get_task(TASKS[name]) for name in LORA}
    generates = kind in ("gpt2", "llama")
    base = small_model(kind, None if generates else 2, **WITHOUT_DROPOUT)
    weights = copy.deepcopy(base.base_model.state_dict())
    for name, lora in LORA.items():
        own = small_model(kind, None if generates else task[name].num_labels, **WITHOUT_DROPOUT)
        own.base_model.load_state_dict(weights)
        if not generates:
            own.config.problem_type = task[name].problem_type
        inject(own, lora)
        randomize_lora_b(own)
        save_adapter(own, folder / name)
        load_adapter(base, folder / name, name, own_head=True)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".run00" in name)
    enable_optimizations(base)
    return base


def batches(kind: str) -> list[RunBatch]:
    ids, found = token_ids(6), []
    for name, lengths in LENGTHS.items():
        own, ids = ids[: len(lengths)], ids[len(lengths) :]
        mask = (torch.arange(7) < torch.tensor(lengths)[:, None])[:, : max(lengths)]
        inputs = {"input_ids": own[:, : max(lengths)].where(mask, 1), "attention_mask": mask.long()}
        if kind in ("gpt2", "llama"):
            inputs["labels"] = inputs["input_ids"].where(mask, IGNORE_INDEX)
            found.append(RunBatch(name, get_task("e2e_nlg"), inputs, inputs["labels"][:, 1:].ne(IGNORE_INDEX).sum()))
            continue
        task = get_task(TASKS[name])
        inputs["labels"] = torch.arange(len(lengths)) % 2 * (1.0 if task.problem_type == "regression" else 1)
        found.append(RunBatch(name, task, inputs))
    return found


def gradients(model: PreTrainedModel, adapter: str) -> dict[str, Tensor]:
    named = {name: each.grad for name, each in model.named_parameters() if f".{adapter}." in name}
    model.zero_grad()
    return {name: grad.clone() for name, grad in named.items() if grad is not None}


def gradients_alone(model: Any, batch: RunBatch) -> tuple[float, dict[str, Tensor]]:
    """As a Trainer computes them: the model's own loss, with the adapter active."""
    set_adapter(model, batch.adapter)
    loss = model(**batch.inputs).loss
    loss.backward()
    return loss.item(), gradients(model, batch.adapter)


@pytest.mark.parametrize("kind", ["roberta", "bert", "distilbert", "deberta-v2", "gpt2", "llama"])
def test_each_run_gets_its_own_loss_and_gradients(kind: str, tmp_path: Path) -> None:
    model, every = adapted(kind, tmp_path), batches(kind)
    alone = {batch.adapter: gradients_alone(model, batch) for batch in every}
    losses = add_gradients(model, every)
    for batch, loss in zip(every, losses, strict=True):
        expected_loss, expected = alone[batch.adapter]
        assert loss.item() == pytest.approx(expected_loss, abs=JOINT_GRADIENT)
        found = {name: each.grad for name, each in model.named_parameters() if f".{batch.adapter}." in name}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=JOINT_GRADIENT, rtol=0)
        assert max(each.abs().max() for each in expected.values()) > 1000 * JOINT_GRADIENT, "none would pass as well"


def test_gradients_add_up_over_batches(tmp_path: Path) -> None:
    model, batch = adapted("roberta", tmp_path), batches("roberta")[0]
    add_gradients(model, [batch])
    whole = gradients(model, batch.adapter)
    for _ in range(2):
        add_gradients(model, [replace(batch, accumulated=2)])
    for name, gradient in gradients(model, batch.adapter).items():
        torch.testing.assert_close(gradient, whole[name], atol=JOINT_GRADIENT, rtol=0)


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_run_that_diverged_leaves_the_others_alone(kind: str, tmp_path: Path) -> None:
    model, (ill, *well) = adapted(kind, tmp_path), batches(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".run000.lora_B" in name:
                parameter.fill_(torch.inf)
    losses = add_gradients(model, [ill, *well])
    assert not losses[0].isfinite()
    assert all(loss.isfinite() for loss in losses[1:])
    for batch in well:
        assert all(each.isfinite().all() for each in gradients(model, batch.adapter).values())
