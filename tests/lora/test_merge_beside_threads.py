"""Merging, unmerging and ejecting a merged adapter beside a running call changes none of its answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lora_hf import eject, inject, merge, set_adapter, unmerge, use_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError
from lora_hf.lora.inject import lora_layers
from lora_hf.models.load import quantise
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.support.waiting import LIMIT
from tests.tolerances import MERGE_FP32

SETTINGS = {
    "plain": LoraConfig(r=2, targets=("all",)),
    "dora": LoraConfig(r=2, targets=("all",), use_dora=True),
    "biases": LoraConfig(r=2, targets=("q", "v"), bias="lora_only"),
}


def adapted(lora: LoraConfig, quantised: bool = False) -> PreTrainedModel:
    model = small_model("roberta", 3)
    model = inject(quantise(model, "int8") if quantised else model, lora, "a")
    randomize_lora_b(model)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(token_ids()).logits


def answer_beside(model: PreTrainedModel, meanwhile: Callable[[], Any]) -> torch.Tensor:
    """The answer of a call that stands still inside each of its LoRA layers in turn while `meanwhile` runs once."""
    layers = list(lora_layers(model).values())
    middle, inside, resume = layers[len(layers) // 2], threading.Event(), threading.Event()
    original = type(middle).forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self is not middle or inside.is_set():
            return original(self, x)
        weights = self.adapters["a"]
        adapt = weights.adapt

        def wait_and_adapt(base_layer: Any, x: torch.Tensor) -> torch.Tensor:
            inside.set()
            assert resume.wait(LIMIT)
            return adapt(base_layer, x)

        weights.adapt = wait_and_adapt
        try:
            return original(self, x)
        finally:
            del weights.adapt

    type(middle).forward = forward  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(logits, model)
            assert inside.wait(LIMIT)
            meanwhile()
            resume.set()
            return answer.result()
    finally:
        type(middle).forward = original  # type: ignore[method-assign]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("change", [merge, lambda model: unmerge(merge(model))])
def test_a_call_that_a_merge_overtakes_is_right(settings: str, change: Callable[[Any], Any]) -> None:
    model = adapted(SETTINGS[settings])
    expected = logits(model)
    found = answer_beside(model, lambda: change(model))
    assert torch.allclose(found, expected, atol=MERGE_FP32)
    assert torch.allclose(logits(model), expected, atol=MERGE_FP32)
    assert torch.equal(logits(unmerge(model)), expected)


def test_a_call_on_a_packed_base_too() -> None:
    model = adapted(SETTINGS["plain"], quantised=True)
    expected = logits(model)
    before = {path: layer.base_layer.packed() for path, layer in lora_layers(model).items()}
    found = answer_beside(model, lambda: merge(model))
    merged = logits(model)
    rounding = float((merged - expected).abs().max())
    assert float((found - expected).abs().max()) <= 2 * rounding + MERGE_FP32, "some layers ran merged, and so rounded"
    for path, layer in lora_layers(unmerge(model)).items():
        assert all(tensor is before[path][name] for name, tensor in layer.base_layer.packed().items())


def test_a_call_that_an_eject_overtakes_is_right() -> None:
    model = adapted(SETTINGS["plain"])
    expected = logits(model)
    found = answer_beside(model, lambda: eject(merge(model)))
    assert torch.allclose(found, expected, atol=MERGE_FP32)
    assert torch.allclose(logits(model), expected, atol=MERGE_FP32)


def test_threads_get_right_answers_or_an_error() -> None:
    model = adapted(SETTINGS["plain"])
    inject(model, LoraConfig(r=4, targets=("q", "v")), "b")
    randomize_lora_b(model, seed=1)
    expected = {}
    for name in ("a", "b", None):
        set_adapter(model, name)
        expected[name] = logits(model)
    set_adapter(model, "a")

    def ask(name: str | None) -> str:
        with use_adapter(model, name):
            try:
                found = logits(model)
            except AdapterError:  # another adapter is merged
                return "refused"
        assert torch.allclose(found, expected[name], atol=MERGE_FP32), name
        return "right"

    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, name) for _ in range(30) for name in expected]
        for _ in range(15):
            merge(model)
            unmerge(model)
        outcomes = [answer.result() for answer in answers]
    assert outcomes[::3] == ["right"] * 30, "the merged adapter runs at any moment"
