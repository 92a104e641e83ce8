"""Copied, pickled and saved models give the same logits and are independent of the original."""

from __future__ import annotations

import contextvars
import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lora_hf import inject, merge, mix_adapters, set_adapter, unmerge, use_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora.chunked_loss import enable_chunked_loss
from lora_hf.lora.inject import adapter_heads, adapter_names, adapter_state, lora_layers
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.models.load import quantise
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.support.waiting import LIMIT

SETTINGS = {
    "a": LoraConfig(r=2, targets=("all",), use_dora=True),
    "b": LoraConfig(r=4, targets=("q", "v"), init_lora_weights="pissa"),
    "c": LoraConfig(r=2, targets=("o",), bias="lora_only"),
}
NAMES = ("a", None, "b")


def through_torch(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "torch.save": through_torch,
}
every_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
Duplicate = Callable[[PreTrainedModel], PreTrainedModel]


def adapted(kind: str, num_labels: int | None = 3) -> PreTrainedModel:
    model = small_model(kind, num_labels)
    for name, lora in SETTINGS.items():
        inject(model, lora, name)
    randomize_lora_b(model)
    for head in adapter_heads(model).values():
        for number, parameter in enumerate(head.parameters()):
            torch.nn.init.constant_(parameter, 0.01 * number)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """The logits of every adapter, of the bare base and of all of them in one batch."""
    found = []
    for name in (*SETTINGS, None):
        with use_adapter(model, name):
            found.append(model(token_ids()).logits)
    with mix_adapters(model, NAMES):
        found.append(model(token_ids()).logits)
    return found


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_copy
@pytest.mark.parametrize(("kind", "num_labels"), [("roberta", 3), ("gpt2", 3), ("gpt2", None)])
def test_a_copy_gives_the_same_logits_and_is_independent(
    kind: str, num_labels: int | None, duplicate: Duplicate
) -> None:
    model = adapted(kind, num_labels)
    set_adapter(model, "a")
    other, expected = duplicate(model), outputs(model)
    assert_equal(outputs(other), expected)
    assert torch.equal(other(token_ids()).logits, expected[0]), "the active adapter is copied"
    assert adapter_names(other) == list(SETTINGS)
    set_adapter(other, "b")
    randomize_lora_b(other, seed=1)
    inject(other, LoraConfig(r=2), "d")
    assert adapter_state(model).active_adapter == "a"
    assert adapter_names(model) == list(SETTINGS)
    assert_equal(outputs(model), expected)


@every_copy
def test_a_copy_made_inside_use_adapter_runs_what_set_adapter_chose(duplicate: Duplicate) -> None:
    model = adapted("roberta")
    set_adapter(model, "a")
    expected = outputs(model)
    with use_adapter(model, "b"):
        other = duplicate(model)
        assert torch.equal(other(token_ids()).logits, expected[0])
        with use_adapter(other, None):
            assert torch.equal(model(token_ids()).logits, expected[1])
    with mix_adapters(model, NAMES):
        other = duplicate(model)
    assert_equal(outputs(other), expected)


@every_copy
def test_a_merged_copy_can_be_unmerged(duplicate: Duplicate) -> None:
    model = adapted("roberta")
    set_adapter(model, "c")
    expected = outputs(model)
    other = duplicate(merge(model))
    assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)
    assert {layer.merged for layer in lora_layers(unmerge(other)).values()} == {None}
    assert_equal(outputs(other), expected)


@every_copy
def test_a_quantized_and_optimized_model_can_be_copied(duplicate: Duplicate) -> None:
    model = inject(quantise(small_model("gpt2"), "int8"), LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    assert enable_unpadding(model) is None
    assert enable_chunked_loss(model)
    inputs = {"input_ids": token_ids(), "attention_mask": torch.ones(3, 7, dtype=torch.long), "labels": token_ids()}
    other = duplicate(model)
    assert torch.equal(other(**inputs).loss, model(**inputs).loss)
    randomize_lora_b(other, seed=1)
    assert not torch.equal(other(**inputs).loss, model(**inputs).loss), "the copy runs its own weights"


def test_each_thread_keeps_its_own_choice() -> None:
    """Both threads are inside `use_adapter` at once, while the main thread keeps what `set_adapter` chose."""
    model = adapted("roberta")
    set_adapter(model, "a")
    expected = dict(zip((*SETTINGS, None), outputs(model), strict=False))
    both_inside, found = threading.Barrier(3, timeout=LIMIT), {}

    def run(name: str | None) -> None:
        with use_adapter(model, name):
            both_inside.wait()
            found[name] = model(token_ids()).logits
            both_inside.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("b", None)]
    for thread in threads:
        thread.start()
    both_inside.wait()
    assert torch.equal(model(token_ids()).logits, expected["a"])
    both_inside.wait()
    for thread in threads:
        thread.join()
    assert torch.equal(found["b"], expected["b"])
    assert torch.equal(found[None], expected[None])


def test_a_thread_started_inside_use_adapter_runs_the_common_choice_unless_given_the_context() -> None:
    model = adapted("roberta")
    set_adapter(model, "a")
    expected, found = outputs(model), []

    def run() -> None:
        found.append(model(token_ids()).logits)

    with use_adapter(model, "b"):
        given = contextvars.copy_context()
        for target in (lambda: contextvars.Context().run(run), lambda: given.run(run)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_two_models_in_one_context_do_not_interfere() -> None:
    one, other = adapted("roberta"), adapted("gpt2")
    expected = outputs(one), outputs(other)
    names = list(SETTINGS)
    outer, inner = use_adapter(one, "a"), use_adapter(other, "b")
    outer.__enter__()
    inner.__enter__()
    assert torch.equal(one(token_ids()).logits, expected[0][names.index("a")])
    assert torch.equal(other(token_ids()).logits, expected[1][names.index("b")])
    outer.__exit__(None, None, None)  # not the one that was entered last
    assert torch.equal(one(token_ids()).logits, expected[0][names.index("c")]), "what inject made active"
    assert torch.equal(other(token_ids()).logits, expected[1][names.index("b")])
    inner.__exit__(None, None, None)
    assert torch.equal(other(token_ids()).logits, expected[1][names.index("c")])
