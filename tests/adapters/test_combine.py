"""Combined adapters: the exact sum, the nearest of a rank, TIES and DARE, and everything that must be refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_hf.adapters.combine import combine_adapters, combine_saved
from lora_hf.adapters.format import CONFIG_FILE
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError, UserError
from lora_hf.lora.inject import adapter_heads, adapter_names, adapter_state, inject, lora_layers, set_adapter
from lora_hf.lora.layers import LoraLinear
from lora_hf.lora.variants.tokens import add_token_rows
from tests.support.small_models import randomize_lora_b, small_model, token_ids
from tests.tolerances import COMBINE_RTOL, COMBINE_SVD_RTOL, FILE_ROUNDTRIP, LEFT_OUT_RTOL, PARITY_FP32

# Other ranks, scalings, targets, and, at gpt2's fused projection, other slices: q and v, k, and the whole of it.
MIXED: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 5, "targets": ("q", "v")},
    "b": {"r": 4, "lora_alpha": 1, "targets": ("all",)},
    "c": {"r": 3, "lora_alpha": 9, "targets": ("q", "v", "ffn_up")},
}
WHOLE = {"r": 3, "lora_alpha": 7, "targets": ("h.*.attn.c_attn",)}
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}


def adapted(kind: str = "roberta", num_labels: int | None = None, **adapters: dict[str, Any]) -> Any:
    """A model with these adapters, they and their heads as different from fresh ones as training makes them."""
    model = small_model(kind, num_labels)
    for name, lora in adapters.items():
        inject(model, LoraConfig(**lora), name)
    randomize_lora_b(model)
    torch.manual_seed(2)
    for head in adapter_heads(model).values():
        for parameter in head.modules_to_save.parameters():
            nn.init.normal_(parameter)
    return model


def sums(model: Any, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The definition: the weighted sum of the dense deltas at each projection."""
    found = {}
    for path, layer in lora_layers(model).items():
        parts = [weight * layer.delta_weight(name) for name, weight in weights.items() if name in layer.adapters]
        found[path] = torch.stack(parts).sum(0).detach()
    return found


@torch.no_grad()
def distance(model: Any, name: str, expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any entry from `expected`, relative to the largest entry of that projection."""
    layers = lora_layers(model)
    return max(
        float((layers[path].delta_weight(name) - delta).abs().max() / delta.abs().max())
        for path, delta in expected.items()
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta"])
def test_linear_is_the_exact_sum_for_any_mix(kind: str) -> None:
    more = {"d": WHOLE} if kind == "gpt2" else {}
    weights = WEIGHTS | dict.fromkeys(more, 0.6)
    model = adapted(kind, 3 if kind == "roberta" else None, **MIXED, **more)
    made = combine_adapters(model, weights, name="mix")
    assert distance(model, "mix", sums(model, weights)) < COMBINE_RTOL
    assert (made.error, set(made.errors.values())) == (0, {0})
    for wrong in (dict.fromkeys(weights, 1.0), {**weights, "b": 0.4}):
        assert distance(model, "mix", sums(model, wrong)) > 0.1, "the test could not fail"


def test_slices_that_all_adapters_share_stay_slices() -> None:
    model = adapted("gpt2", None, a=MIXED["a"], c={**MIXED["c"], "targets": ("q", "v")})
    made = combine_adapters(model, {"a": 0.5, "c": 2.0})
    layers = lora_layers(model)
    assert {tuple(layer.adapters["combined"].slices) for layer in layers.values()} == {((0, 32), (64, 96))}
    assert set(made.ranks.values()) == {5}
    assert distance(model, "combined", sums(model, {"a": 0.5, "c": 2.0})) < COMBINE_RTOL
    assert all(not layer.delta_weight("combined")[32:64].any() for layer in layers.values())


def test_a_combined_layer_has_the_values_and_gradients_of_the_sum() -> None:
    model = adapted("gpt2", None, **MIXED)
    combine_adapters(model, WEIGHTS, name="mix")
    for path, delta in sums(model, WEIGHTS).items():
        layer: LoraLinear = model.get_submodule(path)
        x = torch.randn(4, layer.in_features, requires_grad=True)
        seen = torch.randn(4, layer.out_features)
        y = layer(x)
        by_hand = layer.base_layer(x) + x @ delta.T
        assert torch.allclose(y, by_hand, atol=PARITY_FP32 * float(by_hand.detach().abs().max()))
        (gradient,) = torch.autograd.grad((y * seen).sum(), x)
        (expected,) = torch.autograd.grad((by_hand * seen).sum(), x)
        assert torch.allclose(gradient, expected, atol=PARITY_FP32 * float(expected.abs().max()))
        (wrong,) = torch.autograd.grad((layer.base_layer(x) * seen).sum(), x)
        assert not torch.allclose(gradient, wrong, atol=PARITY_FP32 * float(expected.abs().max()))


def test_the_new_adapter_is_active_and_trainable_and_the_others_are_as_they_were() -> None:
    model, ids = adapted("roberta", 3, **MIXED), token_ids()
    logits = {name: set_adapter(model, name)(ids).logits for name in MIXED}
    combine_adapters(model, WEIGHTS, name="mix")
    assert {layer.active for layer in lora_layers(model).values()} == {"mix"}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".mix." in name for name in trainable)
    mixed = model(ids).logits
    for name, before in logits.items():
        assert torch.equal(set_adapter(model, name)(ids).logits, before)
        assert not torch.allclose(mixed, before)


def test_one_adapter_with_weight_one_is_itself() -> None:
    model, ids = adapted("roberta", 3, **MIXED), token_ids()
    expected = set_adapter(model, "b")(ids).logits
    combine_adapters(model, {"b": 1.0})
    assert torch.allclose(model(ids).logits, expected, atol=PARITY_FP32)


def test_saved_and_loaded_by_us_and_by_peft_it_gives_the_same_logits(tmp_path: Path) -> None:
    model, ids = adapted("gpt2", None, **MIXED, d=WHOLE), token_ids()
    combine_adapters(model, {**WEIGHTS, "d": 0.6}, name="mix")
    save_adapter(model, tmp_path, "mix")
    assert torch.equal(load_adapter(small_model("gpt2"), tmp_path)(ids).logits, model(ids).logits)
    theirs = peft.PeftModel.from_pretrained(small_model("gpt2"), str(tmp_path)).eval()
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=FILE_ROUNDTRIP)


@torch.no_grad()
def test_pefts_linear_is_not_the_weighted_sum_and_ours_is(tmp_path: Path) -> None:
    lora = {"r": 4, "targets": ("q", "v")}
    model = adapted("llama", None, a={**lora, "lora_alpha": 8}, b={**lora, "lora_alpha": 2})
    folders = {name: save_adapter(model, tmp_path / name, name) for name in ("a", "b")}
    theirs = peft.PeftModel.from_pretrained(small_model("llama"), str(folders["a"]), adapter_name="a")
    theirs.load_adapter(str(folders["b"]), adapter_name="b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mix", combination_type="linear")
    combine_adapters(model, {"a": 0.7, "b": 0.3}, name="mix")
    for path, layer in lora_layers(model).items():
        other = theirs.base_model.model.get_submodule(path)
        expected = 0.7 * other.get_delta_weight("a") + 0.3 * other.get_delta_weight("b")
        scale = float(expected.norm())
        assert float((layer.delta_weight("mix") - expected).norm()) < COMBINE_RTOL * scale
        assert float((other.get_delta_weight("mix") - expected).norm()) > 0.1 * scale


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_svd_is_the_nearest_of_the_rank_and_tells_its_error(kind: str) -> None:
    model = adapted(kind, None if kind == "gpt2" else 3, a=MIXED["a"], c={**MIXED["c"], "targets": ("q", "v")})
    weights = {"a": 0.5, "c": -2.0}
    made = combine_adapters(model, weights, "short", "svd", rank=2)
    lost = total = 0.0
    for path, exact in sums(model, weights).items():
        layer = lora_layers(model)[path]
        assert layer.adapters["short"].r == made.ranks[path] == 2
        missed = float((layer.delta_weight("short") - exact).square().sum())
        parts = [exact[start:stop] for start, stop in layer.adapters["short"].slices]
        least = sum(float(torch.linalg.svdvals(part)[2:].square().sum()) for part in parts)
        assert missed == pytest.approx(least, rel=LEFT_OUT_RTOL), "no two matrices of rank 2 come nearer"
        assert made.errors[path] == pytest.approx((missed / float(exact.square().sum())) ** 0.5, rel=LEFT_OUT_RTOL)
        lost, total = lost + missed, total + float(exact.square().sum())
    assert made.error == pytest.approx((lost / total) ** 0.5, rel=LEFT_OUT_RTOL)
    assert made.error > 0.05
    full = combine_adapters(model, weights, "full", "svd", rank=5)
    assert full.error < COMBINE_RTOL
    assert distance(model, "full", sums(model, weights)) < COMBINE_SVD_RTOL
    assert set(combine_adapters(model, weights, "largest", "svd").ranks.values()) == {3}


def test_ties_trims_over_all_projections_elects_and_averages() -> None:
    lora = {"r": 3, "targets": ("q", "ffn_down")}
    model = adapted("roberta", 3, a={**lora, "lora_alpha": 9}, b={**lora, "lora_alpha": 3}, c=lora)
    weights = {"a": 0.6, "b": 1.0, "c": -0.5}
    made = combine_adapters(model, weights, "mix", "ties", rank=32, density=0.3)
    layers = lora_layers(model)
    flat = {
        name: torch.cat([layer.delta_weight(name).flatten() for layer in layers.values()]).detach() for name in weights
    }
    trimmed = []
    for name, weight in weights.items():
        kept = flat[name].abs().argsort(descending=True)[: round(0.3 * len(flat[name]))]
        values = torch.zeros_like(flat[name])
        values[kept] = weight * flat[name][kept]
        trimmed.append(values)
    expected = torch.zeros_like(trimmed[0])
    for index, entries in enumerate(zip(*(values.tolist() for values in trimmed), strict=True)):
        sign = (sum(entries) > 0) - (sum(entries) < 0)
        agreeing = [value for value in entries if value * sign > 0]
        expected[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    found = torch.cat([layer.delta_weight("mix").flatten() for layer in layers.values()]).detach()
    assert made.error < COMBINE_RTOL, "at full rank nothing is left out"
    assert torch.allclose(found, expected, atol=COMBINE_SVD_RTOL * float(expected.abs().max()))
    assert not torch.allclose(found, torch.stack(trimmed).sum(0), atol=0.1)


def test_dare_draws_from_its_seed_and_at_density_one_is_the_sum() -> None:
    model = adapted("gpt2", None, **MIXED)
    combine_adapters(model, WEIGHTS, "whole", "dare", rank=24, density=1.0)
    assert distance(model, "whole", sums(model, WEIGHTS)) < COMBINE_SVD_RTOL
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        combine_adapters(model, WEIGHTS, name, "dare", rank=8, density=0.5, seed=seed)
    for layer in lora_layers(model).values():
        assert torch.equal(layer.delta_weight("one"), layer.delta_weight("again"))
        assert not torch.allclose(layer.delta_weight("one"), layer.delta_weight("two"), atol=1e-2)


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare"])
def test_heads_are_averaged_with_the_weights_over_their_sum(method: Any) -> None:
    model = adapted("roberta", 3, a=MIXED["b"], b=MIXED["b"])
    weights = {"a": 3.0, "b": -1.0}
    density = 0.5 if method in ("ties", "dare") else None
    combine_adapters(model, weights, "mix", method, density=density)
    (head,) = adapter_heads(model).values()
    states = {name: head.modules_to_save[name].state_dict() for name in ("a", "b", "mix")}
    for key, value in states["mix"].items():
        assert torch.allclose(value, 1.5 * states["a"][key] - 0.5 * states["b"][key], atol=PARITY_FP32)
    with pytest.raises(ConfigError, match="expected a sum other than 0, because heads are divided by it"):
        combine_adapters(model, {"a": 1.0, "b": -1.0}, "other", method, density=density)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"weights": {"a": 1, "bb": 1}}, "no adapter 'bb' on this model (did you mean 'b'?); it has: a, b"),
    "no adapter": ({"weights": {}}, "expected at least one adapter with its weight, found nothing"),
    "a weight that is no number": ({"weights": {"a": float("nan")}}, "weight of a: expected a number, found nan"),
    "a name that is taken": ({"name": "a"}, "already has an adapter named 'a'"),
    "unknown method": (
        {"method": "tie"},
        "expected one of linear, svd, ties, dare, found 'tie' (did you mean 'ties'?)",
    ),
    "rank above the layer": (
        {"method": "svd", "rank": 33},
        "rank: expected at most 32, the smaller dimension of",
    ),
    "rank of zero": ({"method": "svd", "rank": 0}, "rank: expected a whole number >= 1, found 0"),
    "rank of linear": ({"rank": 3}, "method linear is exact and adds the ranks up; use svd"),
    "density of linear": ({"density": 0.5}, "method linear does not use it"),
    "no density": ({"method": "ties"}, "above 0 and at most 1, found nothing"),
    "density of zero": ({"method": "dare", "density": 0.0}, "above 0 and at most 1, found 0.0"),
    "density above one": ({"method": "ties", "density": 1.2}, "above 0 and at most 1, found 1.2"),
    "ties of other targets": (
        {"method": "ties", "density": 0.5},
        "they adapt different columns (a: [(0, 32)], b: none)",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_told_and_the_model_left_alone(mistake: str) -> None:
    arguments, message = REFUSED[mistake]
    model = adapted("roberta", 3, a={"r": 2, "targets": ("q", "v")}, b={"r": 2, "targets": ("v",)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        combine_adapters(model, **{"weights": {"a": 0.5, "b": 0.5}, "name": "mix", **arguments})
    assert message in str(error.value)
    after = model.state_dict()
    assert adapter_names(model) == ["a", "b"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_variant_that_is_more_than_its_factors_is_not_summed_as_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("gpt2", None, a=MIXED["a"], c=MIXED["a"])
    plain = LoraLinear.delta_weight
    monkeypatch.setattr(LoraLinear, "delta_weight", lambda self, name: plain(self, name) * (1.5 if name == "c" else 1))
    weights = {"a": 0.5, "c": 0.5}
    for method in ("linear", "svd"):
        with pytest.raises(AdapterError, match=r"'c': its update at .*c_attn is not scaling"):
            combine_adapters(model, weights, "mix", method)
    expected = sums(model, weights)
    combine_adapters(model, weights, "mix", "dare", rank=4, density=1.0)
    assert distance(model, "mix", expected) < COMBINE_SVD_RTOL


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Adapters of the bundled bases, as far as combining looks at them before it loads anything."""
    binary, ternary = adapted("roberta", 2, a=MIXED["a"]), adapted("roberta", 3, a=MIXED["a"])
    for name, model, labels in (("binary", binary, ("negative", "positive")), ("ternary", ternary, ("a", "b", "c"))):
        model.config.id2label = dict(enumerate(labels))
        model.name_or_path = "tiny-roberta"
        save_adapter(model, tmp_path / name, "a", task="sst2" if name == "binary" else "mnli")
    with torch.no_grad():
        binary.roberta.embeddings.word_embeddings.weight[5, 5] += 1
    save_adapter(binary, tmp_path / "moved", "a", task="sst2")
    return tmp_path


def test_folders_that_do_not_belong_together_are_refused(saved: Path) -> None:
    mnli = ("entailment", "neutral", "contradiction")
    ternary = adapted("roberta", 3, a=MIXED["a"])
    ternary.config.id2label = dict(enumerate(mnli))
    ternary.name_or_path = "tiny-roberta"
    save_adapter(ternary, saved / "ternary", "a", task="mnli")
    for other, message in (
        ("moved", "moved were trained on different bases, tiny-roberta and tiny-roberta, whose weights differ"),
        ("ternary", "different labels: negative, positive, and entailment, neutral, contradiction; their heads"),
        ("nowhere", "not an adapter folder"),
    ):
        with pytest.raises(AdapterError) as error:
            combine_saved([(saved / "binary", 0.5), (saved / other, 0.5)], saved / "out")
        assert message in str(error.value)
        assert not (saved / "out").exists()
    (saved / "binary" / CONFIG_FILE).unlink()
    (saved / "binary" / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="a full model"):
        combine_saved([(saved / "binary", 0.5)], saved / "out")


def with_bias_of_b(model: Any, name: str) -> None:
    inject(model, LoraConfig(r=2), name)
    for layer in lora_layers(model).values():
        layer.adapters[name].lora_bias = nn.Parameter(torch.ones(layer.out_features))


def with_token_rows(model: Any, name: str) -> None:
    inject(model, LoraConfig(r=2), name)
    add_token_rows(model, {"roberta.embeddings.word_embeddings": [7]}, name, adapter_state(model))


# How an adapter gets what cannot be combined, and the words of the refusal.
MORE_THAN_LORA: dict[str, tuple[Callable[[Any, str], object], str]] = {
    "biases": (lambda model, name: inject(model, LoraConfig(r=2, bias="lora_only"), name), "trains biases"),
    "biases of B": (with_bias_of_b, "trains biases"),
    "token rows": (with_token_rows, "trainable_token_indices"),
}


@pytest.mark.parametrize("more", MORE_THAN_LORA)
def test_what_cannot_be_combined_is_not_dropped_in_silence(more: str) -> None:
    add, message = MORE_THAN_LORA[more]
    model = small_model("roberta", 2)
    add(model, "more")
    inject(model, LoraConfig(r=2), "plain")
    with pytest.raises(AdapterError, match=f"'more' .*{message}"):
        combine_adapters(model, {"plain": 1.0, "more": 1.0})
    assert adapter_names(model) == ["more", "plain"]
    combine_adapters(model, {"plain": 1.0})


def test_a_module_that_only_some_adapters_train_is_not_averaged() -> None:
    model = inject(small_model("llama"), LoraConfig(r=2, targets=("q",)), "plain")
    inject(model, LoraConfig(r=2, targets=("q",), modules_to_save=("norm",)), "whole")
    norms = model.model.norm.modules_to_save
    nn.init.normal_(norms["whole"].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"model\.norm: of plain, whole, only whole"):
        combine_adapters(model, {"plain": 0.5, "whole": 0.5}, "mix")
    after = model.state_dict()
    assert adapter_names(model) == ["plain", "whole"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    combine_adapters(model, {"whole": 2.0}, "mix")
    assert torch.equal(norms["mix"].weight, norms["whole"].weight)


@pytest.mark.parametrize("num_labels", [1, 2])  # the head of one label would be added to each row of the other
def test_heads_of_other_labels_are_not_averaged(num_labels: int, tmp_path: Path) -> None:
    model = adapted("roberta", 3, a=MIXED["a"])
    save_adapter(adapted("roberta", num_labels, b=MIXED["a"]), tmp_path, "b")
    load_adapter(model, tmp_path, "b", own_head=True)
    with pytest.raises(AdapterError, match="trained for different labels: LABEL_0, LABEL_1, LABEL_2, and LABEL_0"):
        combine_adapters(model, {"a": 0.5, "b": 0.5})
    assert adapter_names(model) == ["a", "b"]
