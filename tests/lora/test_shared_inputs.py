"""Projections of one input that run together give the outputs and gradients of each alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import PreTrainedModel

from lora_hf import inject, merge, set_adapter, unmerge
from lora_hf.core.config.schema import LoraConfig
from lora_hf.lora import shared_inputs
from lora_hf.lora.architectures import ARCHITECTURES
from lora_hf.lora.inject import lora_layers, mark_only_lora_as_trainable
from lora_hf.lora.kernels.fused import Projection
from lora_hf.lora.shared_inputs import share_inputs
from tests import tolerances
from tests.support.gradients import assert_same, loss_and_gradients
from tests.support.small_models import CLASSIFIERS, SHAPES, randomize_lora_b, small_model, token_ids

# The types that fuse q, k and v themselves, gate and up included, have nothing to share.
FUSED = ("gpt2", "gpt_neox", "bloom", "falcon", "phi3", "modernbert", "deberta")
KINDS = [kind for kind, entry in ARCHITECTURES.items() if not entry.several_inputs and kind not in FUSED]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of projections in each call that computes several."""
    calls: list[int] = []
    compute = shared_inputs.lora_linears

    def record(x: torch.Tensor, projections: list[Projection]) -> tuple[torch.Tensor, ...]:
        calls.append(len(projections))
        return compute(x, projections)

    monkeypatch.setattr(shared_inputs, "lora_linears", record)
    return calls


def adapted(kind: str, **lora: object) -> PreTrainedModel:
    model = inject(small_model(kind, 3 if kind in CLASSIFIERS else None), LoraConfig(r=2, targets=("all",), **lora))  # type: ignore[arg-type]
    randomize_lora_b(model)
    return model.eval()  # dropout of the base would draw other masks after other draws


def nothing_is_kept(model: PreTrainedModel) -> bool:
    groups = [layer.shared_input for layer in lora_layers(model).values() if layer.shared_input]
    return bool(groups) and all(group._pending is None for group in groups)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_each_alone(kind: str, computed: list[int]) -> None:
    model = adapted(kind)
    alone = loss_and_gradients(model)
    assert not computed
    groups = share_inputs(model)
    assert groups == share_inputs(model), "twice is once"
    assert_same(loss_and_gradients(model), alone)
    layers = 1 if kind == "albert" else 2
    feed_forward = sum(role in ARCHITECTURES[kind].projections for role in ("ffn_gate", "ffn_up")) == 2
    experts = kind in ("mixtral", "qwen2_moe", "qwen3_moe")
    per_layer = [3, 2] if feed_forward and not experts else [3]
    assert groups == layers * len(per_layer)
    assert computed == per_layer * 2, "each output is computed once"
    assert nothing_is_kept(model)


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind not in (*KINDS, "t5", "mt5")])
def test_other_types_stay_as_they_are(kind: str) -> None:
    assert share_inputs(adapted(kind)) == 0


def test_an_unknown_type_stays_as_it_is() -> None:
    assert share_inputs(adapted("stablelm")) == 0


@pytest.mark.parametrize(
    "why",
    ["dropout", "dora", "bias", "two of three", "one of three", "merged", "autocast", "no gradients", "compiling"],
)
def test_what_cannot_run_together_runs_alone(why: str, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}, "bias": {"bias": "lora_only"}}
    targets = {"two of three": ("q", "v"), "one of three": ("k",)}.get(why, ("q", "k", "v"))
    model = inject(small_model("llama"), LoraConfig(r=2, targets=targets, **more.get(why, {})))  # type: ignore[arg-type]
    assert share_inputs(model) == (0 if why == "one of three" else 2)
    model.train()
    if why == "merged":
        merge(model)
    if why == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with (
        torch.set_grad_enabled(why != "no gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
    ):
        model(token_ids())
    # Llama has no biases, so `lora_only` trains none.
    assert computed == ([2, 2] if why == "two of three" else [3, 3] if why == "bias" else [])
    if why == "merged":
        unmerge(model)
        model(token_ids())
        assert computed == [3, 3]


def test_each_adapter_runs_with_its_own_projections(computed: list[int]) -> None:
    model = adapted("bert")
    inject(model, LoraConfig(r=3, targets=("q", "v")), "other")
    randomize_lora_b(model)
    wanted = {}
    for name in ("default", "other"):
        mark_only_lora_as_trainable(set_adapter(model, name))
        wanted[name] = loss_and_gradients(model)
    share_inputs(model)
    for name, number in (("default", 3), ("other", 2)):
        computed.clear()
        mark_only_lora_as_trainable(set_adapter(model, name))
        assert_same(loss_and_gradients(model), wanted[name])
        assert computed == [number] * 2


@pytest.mark.parametrize("change", ["another tensor", "the same tensor changed in place", "called twice"])
def test_an_input_that_is_not_the_same_is_multiplied_again(change: str, computed: list[int]) -> None:
    model = adapted("bert")
    share_inputs(model)
    attention = model.base_model.encoder.layer[0].attention.self
    x = torch.randn(1, 5, 32)
    attention.query(x)
    other = x.clone() if change == "another tensor" else x
    if change == "the same tensor changed in place":
        other.add_(1)
    projection = attention.query if change == "called twice" else attention.key
    y = projection(other)
    assert computed == [3, 3]
    with torch.no_grad():
        torch.testing.assert_close(y, projection(other), atol=tolerances.FAST_TRAINING_FP32, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool, computed: list[int]) -> None:
    model = adapted("llama").train()  # this Llama has no dropout
    model.enable_input_require_grads()
    alone = loss_and_gradients(model)
    share_inputs(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(loss_and_gradients(model), alone)
    assert computed == [3, 2] * (2 if reentrant else 4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_shares_inputs_among_its_own_layers(duplicate: object, computed: list[int]) -> None:
    model = adapted("bert")
    share_inputs(model)
    attention = model.base_model.encoder.layer[0].attention.self
    attention.query(torch.randn(1, 5, 32))  # outputs of key and value are pending, which belong to a graph
    twin = duplicate(model)  # type: ignore[operator]
    assert nothing_is_kept(twin)
    wanted = loss_and_gradients(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(loss_and_gradients(twin), wanted)
