"""Many adapters on one model: a thread's own choice, and rows of one batch under different adapters."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lora_hf import load_adapter, mix_adapters, save_adapter, set_adapter, unload_adapter, use_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError
from lora_hf.lora.active_adapter import STATE_ATTRIBUTE, BatchRouting
from lora_hf.lora.inject import adapter_names, inject, lora_layers, merge
from lora_hf.lora.kernels import grouped
from lora_hf.lora.layers import LoraWeights
from lora_hf.lora.unpadding import enable_unpadding
from tests import tolerances
from tests.support.small_models import randomize_lora_b, small_model, token_ids

KINDS = ("roberta", "bert", "distilbert", "deberta-v2", "gpt2", "llama")
SETTINGS = {
    "a": LoraConfig(r=2, targets=("all",)),
    "b": LoraConfig(r=4, lora_alpha=3, targets=("q", "v")),
    "c": LoraConfig(r=1, targets=("ffn_down",)),
}
NAMES = ("b", None, "a", "c", "a")


def adapted(kind: str, num_labels: int | None = None) -> PreTrainedModel:
    """A model with adapters of different ranks, alphas, targets and (classifiers) labels: 3, 4 and 5 of them."""
    model = small_model(kind, num_labels)
    for name, lora in SETTINGS.items():
        inject(model, lora, name)
    randomize_lora_b(model)
    return model


def classifier(kind: str, folder: Path) -> PreTrainedModel:
    """The same, each adapter trained on a base with labels of its own."""
    model = small_model(kind, 2)
    for labels, (name, lora) in enumerate(SETTINGS.items(), start=3):
        other = small_model(kind, labels)
        other.base_model.load_state_dict(model.base_model.state_dict())
        inject(other, lora)
        randomize_lora_b(other, seed=labels)
        save_adapter(other, folder / name)
    for name in SETTINGS:
        load_adapter(model, folder / name, name, own_head=True)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    mask = torch.arange(7) < torch.tensor((7, 3, 5, 6, 2))[:, None]
    return {"input_ids": token_ids(5).where(mask, 1), "attention_mask": mask.long()}


def alone(model: PreTrainedModel, inputs: dict[str, torch.Tensor], row: int, name: str | None) -> torch.Tensor:
    set_adapter(model, name)
    return model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padding", [True, False])
def test_each_row_is_what_its_adapter_alone_gives(kind: str, grad: bool, padding: bool, tmp_path: Path) -> None:
    model, inputs = classifier(kind, tmp_path), batch()
    if not padding:
        enable_unpadding(model)
    with torch.set_grad_enabled(grad):
        with mix_adapters(model, NAMES):
            mixed = model(**inputs).logits
        assert mixed.shape == (5, 5)
        for row, name in enumerate(NAMES):
            expected = alone(model, inputs, row, name)
            torch.testing.assert_close(mixed[row, : len(expected)], expected, atol=tolerances.MIXED_FP32, rtol=0)
            assert torch.isneginf(mixed[row, len(expected) :]).all()
            other = alone(model, inputs, row, "b" if name == "a" else "a")
            width = min(len(other), len(expected))
            assert (other[:width] - expected[:width]).abs().max() > 100 * tolerances.MIXED_FP32


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_each_adapter_gets_the_gradients_of_its_own_rows(kind: str) -> None:
    inputs = batch()
    found = []
    for mixed in (True, False):
        model = adapted(kind, 3)
        model.requires_grad_(True)
        enable_unpadding(model)
        if mixed:
            with mix_adapters(model, NAMES):
                model(**inputs).logits.square().sum().backward()
        else:
            for row, name in enumerate(NAMES):
                alone(model, inputs, row, name).square().sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if ".adapters." in key})
    for key, gradient in found[1].items():
        assert gradient is not None, key
        assert gradient.any(), key
        error = (found[0][key] - gradient).abs().max() / gradient.abs().max()
        assert error < tolerances.MIXED_GRADIENT_RTOL, key


def test_a_mixture_in_training_drops_what_its_adapters_drop() -> None:
    model, inputs = adapted("roberta", 3), batch()
    enable_unpadding(model)
    for layer in lora_layers(model).values():
        layer.adapters["a"].lora_dropout = 0.5
    for module in model.modules():
        module.train(isinstance(module, LoraWeights))
    with mix_adapters(model, NAMES):
        first, second = (model(**inputs).logits for _ in range(2))
    for row, name in enumerate(NAMES):
        assert torch.equal(first[row], second[row]) == (name != "a"), f"row {row} under {name}"


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "decoding",
    [{"num_beams": 1}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}, {"num_return_sequences": 2, "num_beams": 2}],
)
def test_texts_of_a_mixed_batch_are_those_of_each_adapter_alone(kind: str, decoding: dict[str, int]) -> None:
    model = adapted(kind)
    inputs = {key: value.flip(1) for key, value in batch().items()}
    options = {"max_new_tokens": 6, "pad_token_id": 1, "do_sample": False, **decoding}
    with mix_adapters(model, NAMES):
        mixed = model.generate(**inputs, **options)
    times = decoding.get("num_return_sequences", 1)
    texts = set()
    for row, name in enumerate(NAMES):
        set_adapter(model, name)
        text = model.generate(**{key: value[row : row + 1] for key, value in inputs.items()}, **options)
        texts.add(tuple(text[0].tolist()))
        assert torch.equal(mixed[row * times : (row + 1) * times, 7:], text[:, 7:])
    assert len(texts) == 5


def test_a_row_alone_is_adapted_in_generation_after_a_forward_without_padding() -> None:
    model, inputs = adapted("gpt2"), {key: value[:1] for key, value in batch().items()}
    enable_unpadding(model)
    options = {"max_new_tokens": 6, "pad_token_id": 1, "do_sample": False}
    texts = []
    for name in ("a", None):
        set_adapter(model, name)
        texts.append(model.generate(**inputs, **options))
    with torch.inference_mode(), mix_adapters(model, ["a"]):
        model(**inputs)
        assert torch.equal(model.generate(**inputs, **options), texts[0])
    assert not torch.equal(texts[0], texts[1])


def test_a_torch_without_grouped_products_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("gpt2", 3), batch()
    found = []
    for has in (True, False):
        monkeypatch.setattr(grouped, "_has_grouped", lambda *_, has=has: has)
        with torch.inference_mode(), mix_adapters(model, NAMES):
            found.append(model(**inputs).logits)
    torch.testing.assert_close(found[1], found[0], atol=tolerances.MIXED_FP32, rtol=0)


def test_half_precision_takes_the_wide_product() -> None:
    model, inputs = adapted("roberta", 3).to(torch.bfloat16), batch()
    with torch.inference_mode():
        with mix_adapters(model, NAMES):
            mixed = model(**inputs).logits
        alones = [alone(model, inputs, row, name).float() for row, name in enumerate(NAMES)]
    for row, expected in enumerate(alones):
        torch.testing.assert_close(
            mixed[row], expected, atol=tolerances.MERGE_BF16 * float(expected.abs().max()), rtol=0
        )


def test_stacked_weights_follow_a_change() -> None:
    model, inputs = adapted("roberta", 3), batch()
    with torch.inference_mode():
        with mix_adapters(model, NAMES):
            before = model(**inputs).logits
            assert torch.equal(model(**inputs).logits, before)
        randomize_lora_b(model, seed=9)
        with mix_adapters(model, NAMES):
            after = model(**inputs).logits
    assert (after - before)[2].abs().max() > 100 * tolerances.MIXED_FP32
    torch.testing.assert_close(after[2], alone(model, inputs, 2, NAMES[2]), atol=tolerances.MIXED_FP32, rtol=0)


@pytest.mark.parametrize("has_grouped", [True, False])
def test_one_stack_of_all_adapters_serves_rows_of_any(has_grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_has_grouped", lambda *_: has_grouped)
    model, inputs = adapted("roberta", 3), batch()
    enable_unpadding(model)
    stacks: dict = {}
    with torch.inference_mode():
        for rows in (["b", None, "b", "c", "c"], ["a"] * 5, [None] * 5, list(NAMES)):
            with mix_adapters(model, rows, stacks, list(SETTINGS)):
                mixed = model(**inputs).logits
            for row, name in enumerate(rows):
                expected = alone(model, inputs, row, name)
                torch.testing.assert_close(mixed[row], expected, atol=tolerances.MIXED_FP32, rtol=0)
    assert {names for _, names, _ in stacks} == {tuple(SETTINGS), *SETTINGS}
    with pytest.raises(AdapterError, match="no adapter 'd'"), mix_adapters(model, ["a"], stacks, ["a", "d"]):
        pass


@pytest.mark.full
def test_threads_choose_for_themselves() -> None:
    """More threads than adapters, each its own, while another switches the model's choice to and fro."""
    model, inputs = adapted("roberta", 3), batch()
    enable_unpadding(model)
    names = ["a", "b", "c", None]
    with torch.inference_mode():
        expected = {name: torch.stack([alone(model, inputs, row, name) for row in range(5)]) for name in names}
    failures: list[object] = []
    stop = threading.Event()

    def work(name: str | None) -> None:
        try:
            for _ in range(20):
                with torch.inference_mode(), use_adapter(model, name):
                    found = model(**inputs).logits
                torch.testing.assert_close(found, expected[name], atol=tolerances.MIXED_FP32, rtol=0)
        except Exception as error:  # noqa: BLE001  (a thread's failures are told in the main one)
            failures.append(error)

    def flip() -> None:
        while not stop.is_set():
            for name in names:
                set_adapter(model, name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
    flipper = threading.Thread(target=flip)
    for thread in (flipper, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    flipper.join()
    assert not failures


def test_a_choice_ends_with_its_block_even_after_an_error() -> None:
    model, inputs = adapted("roberta", 3), batch()
    set_adapter(model, "a")
    with pytest.raises(ZeroDivisionError), use_adapter(model, "b"), use_adapter(model, None):
        raise ZeroDivisionError
    torch.testing.assert_close(model(**inputs).logits[0], alone(model, inputs, 0, "a"))


def test_unloaded_is_gone_and_the_others_stay() -> None:
    model, inputs = adapted("roberta", 3), batch()
    expected = alone(model, inputs, 0, "b")
    set_adapter(model, "a")
    unload_adapter(model, "a")
    assert adapter_names(model) == ["b", "c"]
    torch.testing.assert_close(model(**inputs).logits[0], alone(model, inputs, 0, None))
    torch.testing.assert_close(alone(model, inputs, 0, "b"), expected)
    inject(model, SETTINGS["a"], "a")


def test_a_copy_has_a_choice_of_its_own() -> None:
    model, inputs = adapted("roberta", 3), batch()
    set_adapter(model, "a")
    other = copy.deepcopy(model)
    set_adapter(other, "b")
    assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
    torch.testing.assert_close(other(**inputs).logits[0], alone(model, inputs, 0, "b"))


def test_labels_come_and_go_with_the_adapter(tmp_path: Path) -> None:
    model = classifier("roberta", tmp_path)
    assert (model.config.num_labels, model.num_labels) == (5, 5)
    set_adapter(model, "a")
    assert (model.config.num_labels, model.num_labels) == (3, 3)
    loss = model(**batch(), labels=torch.tensor([2, 1, 0, 2, 2])).loss
    assert loss.isfinite()
    save_adapter(model, tmp_path / "again", "c")
    load_adapter(small_model("roberta", 5), tmp_path / "again")
    set_adapter(model, None)
    assert model.config.num_labels == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [(["a", "d"], "no adapter 'd'"), ([], "no rows"), (["a", "aa"], "did you mean")],
)
def test_a_mixture_of_what_is_not_there(rows: list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message), mix_adapters(adapted("roberta", 3), rows):
        pass


def test_what_is_merged_cannot_be_mixed() -> None:
    model = adapted("roberta", 3)
    set_adapter(model, "a")
    merge(model)
    with pytest.raises(AdapterError, match="unmerge it first"), mix_adapters(model, NAMES):
        model(**batch())
    with pytest.raises(AdapterError, match="unmerge it first"), use_adapter(model, "b"):
        model(**batch())
    set_adapter(model, "b")
    torch.testing.assert_close(model(**batch()).logits[0], alone(adapted("roberta", 3), batch(), 0, "b"))


def test_another_number_of_rows_than_named_is_an_error() -> None:
    model = adapted("roberta", 3)
    with pytest.raises(AdapterError, match=r"5 rows; .*a batch of 3"), mix_adapters(model, NAMES):
        model(**{key: value[:3] for key, value in batch().items()})


def test_a_mixture_knows_its_rows() -> None:
    mixture = BatchRouting(["x", None, "y", "x"])
    assert mixture.names == ("x", "y")
    assert mixture.rows_of("x", 8).tolist() == [0, 1, 6, 7]
    segments = mixture.segments(4)
    assert segments.order is not None
    assert segments.order.tolist() == [0, 3, 2, 1]
    assert segments.ends == (2, 3)


VARIANTS = {
    "dora": LoraConfig(r=2, targets=("all",), use_dora=True),
    "pissa": LoraConfig(r=2, lora_alpha=2, targets=("q", "v"), init_lora_weights="pissa", use_rslora=True),
    "biased": LoraConfig(r=3, targets=("o", "ffn_up"), bias="lora_only"),
    "plain": LoraConfig(r=4, targets=("all",), rank_pattern={"ffn_down": 2}),
}


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
@pytest.mark.parametrize("padding", [True, False])
def test_variants_mix_with_plain_adapters(kind: str, padding: bool) -> None:
    model, inputs = small_model(kind, 3), batch()
    for name, lora in VARIANTS.items():
        inject(model, lora, name)
    randomize_lora_b(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key or key.endswith("adapters.biased.bias"):
                parameter.add_(0.1)
    if not padding:
        enable_unpadding(model)
    rows = ["biased", "dora", None, "pissa", "plain"]
    with torch.inference_mode():
        with mix_adapters(model, rows):
            mixed = model(**inputs).logits
        for row, name in enumerate(rows):
            expected = alone(model, inputs, row, name)
            torch.testing.assert_close(mixed[row], expected, atol=tolerances.MIXED_FP32, rtol=0)
            bare = alone(model, inputs, row, None)
            assert name is None or (bare - expected).abs().max() > 10 * tolerances.MIXED_FP32


def test_biases_of_all_modules_mix_too() -> None:
    model, inputs = small_model("bert", 3), batch()
    for name in ("x", "y"):
        inject(model, LoraConfig(r=2, targets=("q",), bias="all"), name)
    with torch.no_grad():
        for number, (key, parameter) in enumerate(model.named_parameters()):
            if ".adapters." in key and key.endswith(".bias"):
                parameter.add_(0.05 * (number % 7 - 3))
    enable_unpadding(model)
    rows = ["y", "x", None, "x", "y"]
    with torch.inference_mode():
        with mix_adapters(model, rows):
            mixed = model(**inputs).logits
        alones = [alone(model, inputs, row, name) for row, name in enumerate(rows)]
        unload_adapter(model, "x")
        assert alone(model, inputs, 0, "y").equal(alones[0])
    torch.testing.assert_close(mixed, torch.stack(alones), atol=tolerances.MIXED_FP32, rtol=0)


def test_an_adapter_adapts_what_an_unloaded_one_trained_the_bias_of() -> None:
    model = small_model("bert", 3)
    inject(model, LoraConfig(r=2, targets=("q",), bias="all"), "x")
    unload_adapter(model, "x")
    assert adapter_names(inject(model, LoraConfig(r=2, targets=("v",)), "y")) == ["y"]


def test_another_adapter_trains_once_it_is_chosen_for_training() -> None:
    model = small_model("roberta", 3)
    for name in ("x", "y"):
        inject(model, LoraConfig(r=2, targets=("q",), bias="lora_only"), name)

    def trained() -> set[str]:
        return {part for path, each in model.named_parameters() if each.requires_grad for part in path.split(".")}

    assert "y" in trained()
    assert "x" not in trained()
    set_adapter(model, "x")
    assert "x" not in trained()
    set_adapter(model, "x", trainable=True)
    assert {"x", "lora_A", "lora_B", "classifier"} <= trained()
    assert "y" not in trained()
    model(token_ids(2, 4), labels=torch.tensor([0, 1])).loss.backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("others", [True, False])
def test_an_unloaded_adapter_leaves_no_module_behind(others: bool) -> None:
    model, ids = small_model("roberta", 3), token_ids(2, 4)
    before = {path: type(module) for path, module in model.named_modules()}
    logits = model(ids).logits
    inject(model, LoraConfig(r=2, targets=("q", "ffn_up"), modules_to_save=("word_embeddings",)), "x")
    if others:
        inject(model, LoraConfig(r=2, targets=("q",)), "y")
        unload_adapter(model, "x")
        assert set(lora_layers(model)) == {path for path in before if path.endswith("attention.self.query")}
        set_adapter(model, None)
    unload_adapter(model, "y" if others else "x")
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert not hasattr(model.base_model, STATE_ATTRIBUTE)
    assert model(ids).logits.equal(logits)
    assert {path.split(".")[0] for path, each in model.named_parameters() if each.requires_grad} == {"classifier"}
    assert adapter_names(inject(model, LoraConfig(r=2), "x")) == ["x"]


@pytest.mark.parametrize(
    ("kind", "shape", "target"),
    [
        ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}, "layer_1"),
        (
            "longformer",
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
             "attention_window": 4, "pad_token_id": 1},
            "query",
        ),
    ],
)  # fmt: skip
def test_a_model_with_the_sequence_first_does_not_mix_rows(kind: str, shape: dict[str, Any], target: str) -> None:
    """A sequence whose length is a multiple of the rows would look like beams of these rows."""
    model: Any = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, vocab_size=100, **shape))
    ids = token_ids(2, 4)
    for name in ("x", "y"):
        inject(model.eval(), LoraConfig(r=2, targets=(target,)), name)
    with pytest.raises(AdapterError, match=kind), mix_adapters(model, ["x", "y"]):
        model(input_ids=ids)
    with torch.no_grad(), mix_adapters(model, ["x", "x"]):
        assert model(input_ids=ids).logits.shape == (2, 2)
