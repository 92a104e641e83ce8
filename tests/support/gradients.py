"""The loss and every gradient of a model on fixed tokens, and their comparison."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tests import tolerances
from tests.support.small_models import token_ids


def loss_and_gradients(model: PreTrainedModel, run: Any = None) -> list[torch.Tensor]:
    """The loss, then the gradients of the model's parameters; `run` is called in its place, such as a compiled one."""
    model.zero_grad()
    logits = (model if run is None else run)(token_ids()).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    loss.backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 4
    for ours, alone in zip(found, wanted, strict=True):
        atol = tolerances.PADDING_FREE_GRADIENTS * max(1, float(alone.abs().max()))
        torch.testing.assert_close(ours, alone, atol=atol, rtol=0)
