"""A packed base: what the tensors mean, values and every gradient through them, merging, files, runs, prediction."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.cli.main import main
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import LoraConfig, ModelConfig, RunConfig
from lora_hf.core.errors import AdapterError, ConfigError, ModelError, how_to_install
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor, evaluate
from lora_hf.lora import quantization
from lora_hf.lora.active_adapter import AdapterState
from lora_hf.lora.inject import (
    adapter_heads,
    count_parameters,
    eject,
    inject,
    lora_layers,
    merge,
    merge_drift,
    unmerge,
)
from lora_hf.lora.layers import LoraLinear, LoraWeights
from lora_hf.lora.multi_adapter import use_adapter
from lora_hf.lora.quantization import QuantisedLinear, keep_input_gradients, pack, unpack
from lora_hf.lora.target_modules import plan, projections
from lora_hf.models.load import dequantise, load_base, quantise, quantised_layers
from lora_hf.training.run import train
from tests.support.small_models import randomize_lora_b, small_config, small_model, token_ids
from tests.tolerances import (
    INT8_LAYER_RTOL,
    INT8_MODEL_RTOL,
    NF4_TABLE,
    PACKED_HEAD_FP32,
    PARITY_FP32,
    QUANTISED_BF16_RTOL,
    QUANTISED_FP32,
)

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason=f"nf4 needs bitsandbytes: {how_to_install('quantised')}",
)
SCHEMES = ["int8", pytest.param("nf4", marks=NEEDS_BITSANDBYTES)]
KINDS = ["roberta", "bert", "distilbert", "deberta-v2", "gpt2", "llama"]

# QLoRA, arXiv 2305.14314, appendix E.
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


# The tensors.


def test_int8_is_the_nearest_of_255_steps_of_each_row() -> None:
    weight = torch.tensor([[127.0, -63.4, 0.6], [-0.254, 0.001, 0.0], [0.0, 0.0, 0.0]])
    packed = pack(weight, "int8")
    assert packed["values"].tolist() == [[127, -63, 1], [-127, 0, 0], [0, 0, 0]]
    assert packed["scales"][:2].tolist() == pytest.approx([1.0, 0.002])
    assert unpack(packed, "int8", (3, 3), torch.float32)[2].tolist() == [0, 0, 0]
    large = torch.randn(40, 64)
    error = (unpack(pack(large, "int8"), "int8", (40, 64), torch.float32) - large).abs()
    step = large.abs().amax(1, keepdim=True) / 127
    assert (error <= 0.5001 * step).all()
    assert (error > 0.4 * step).any(), "the bound is no looser than rounding"


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("shape", [(96, 64), (48, 32), (32, 48), (33, 50), (7, 3), (300, 64)])
def test_nf4_is_the_published_table_times_the_scales(shape: tuple[int, int]) -> None:
    """Rows that are no whole number of blocks, too: bitsandbytes' own CPU kernel unpacks (48, 32) wrongly by rows."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed = pack(weight, "nf4")
    count = weight.numel()
    nibbles = packed["values"].view(-1)
    codes = torch.stack([nibbles >> 4, nibbles & 15], dim=1).view(-1)[:count].long()
    of_scales = packed["scales_of_scales"].repeat_interleave(256)[: len(packed["scales"])]
    scales = packed["code"][packed["scales"].long()] * of_scales + packed["offset"]
    expected = (NF4[codes] * scales.repeat_interleave(64)[:count]).view(shape)
    found = unpack(packed, "nf4", shape, torch.float32)
    assert torch.allclose(found, expected, atol=NF4_TABLE)
    without_offset = NF4[codes] * (scales - packed["offset"]).repeat_interleave(64)[:count]
    assert not torch.allclose(found, without_offset.view(shape), atol=NF4_TABLE), "the test could not fail"
    assert float((found - weight).norm() / weight.norm()) < 0.12, "four bits of a normal distribution"


@NEEDS_BITSANDBYTES
def test_nf4_takes_little_more_than_four_bits_a_weight() -> None:
    packed = pack(torch.randn(512, 512), "nf4")
    held = sum(tensor.numel() * tensor.element_size() for name, tensor in packed.items() if name != "code")
    assert held * 8 / 512**2 < 4.2


# The layer.


def adapted(scheme: str, transposed: bool, slices: list[tuple[int, int]], bias: bool = True) -> LoraLinear:
    torch.manual_seed(0)
    plain: Any = Conv1D(18, 10) if transposed else nn.Linear(10, 18, bias=bias)
    nn.init.normal_(plain.weight)
    if bias:
        nn.init.normal_(plain.bias)
    layer = LoraLinear(QuantisedLinear(plain.requires_grad_(False), scheme), AdapterState())
    layer.adapters["default"] = LoraWeights(10, slices, r=3, lora_alpha=5)
    nn.init.normal_(layer.adapters["default"].lora_B)
    layer.adapter_state.active_adapter = "default"
    return layer


def dequantised(layer: LoraLinear) -> LoraLinear:
    """The same over a plain layer that holds the weight as it is unpacked."""
    other = copy.deepcopy(layer)
    other.base_layer = layer.base_layer.plain()
    return other


def outcome(layer: LoraLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x, A and B."""
    x = x.clone().requires_grad_(True)
    weights = layer.adapters["default"]
    y = layer(x)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, weights.lora_A, weights.lora_B], dy)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slices", [[(0, 18)], [(0, 6), (12, 18)]])
def test_values_and_every_gradient_are_those_of_the_dequantised_weight(
    scheme: str, transposed: bool, slices: list[tuple[int, int]]
) -> None:
    layer, x = adapted(scheme, transposed, slices), torch.randn(2, 5, 10)
    other = dequantised(layer)
    assert type(other.base_layer) is (Conv1D if transposed else nn.Linear)
    for found, expected in zip(outcome(layer, x), outcome(other, x), strict=True):
        assert torch.allclose(found, expected, atol=QUANTISED_FP32)
    moved = copy.deepcopy(other)
    moved.base_layer.weight.data *= 1.01
    for at, name in enumerate(("y", "dx")):
        near = outcome(moved, x)[at]
        assert not torch.allclose(outcome(layer, x)[at], near, atol=QUANTISED_FP32), f"{name}: the test could not fail"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cast_leaves_the_packed_weight_and_lora_exact(scheme: str) -> None:
    layer, x = adapted(scheme, False, [(0, 18)]), torch.randn(4, 10)
    before, exact = layer.base_layer.packed(), outcome(layer, x)
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.base_layer.packed().items())
    found = outcome(layer, x.bfloat16())
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for rounded, expected in zip(found, exact, strict=True):
        assert float((rounded.float() - expected).abs().max()) <= QUANTISED_BF16_RTOL * float(expected.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_decides_the_precision(scheme: str) -> None:
    layer = adapted(scheme, False, [(0, 18)])
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(layer, torch.randn(4, 10))
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def test_a_trained_bias_gets_its_gradient() -> None:
    layer = QuantisedLinear(nn.Linear(10, 18), "int8")
    x, dy = torch.randn(2, 5, 10), torch.randn(2, 5, 18)
    (found,) = torch.autograd.grad(layer(x), [layer.bias], dy)
    assert torch.allclose(found, dy.sum((0, 1)), atol=QUANTISED_FP32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_in_between_does_not_change_the_gradient_of_what_was_computed(scheme: str) -> None:
    layer, x = adapted(scheme, False, [(0, 18)]), torch.randn(4, 10, requires_grad=True)
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    layer.merge()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


# Merging.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_requantises_the_fp32_sum_and_tells_what_it_lost(scheme: str, transposed: bool) -> None:
    layer, x = adapted(scheme, transposed, [(0, 6), (12, 18)]), torch.randn(4, 10)
    base, before, unmerged = layer.base_layer, layer.base_layer.packed(), layer(x)
    delta = layer.delta_weight("default").detach()
    asked = base.dequantise() + delta
    held = unpack(pack(asked, scheme), scheme, (18, 10), torch.float32)
    assert layer.drift is None
    for _ in range(5):
        layer.merge()
        layer.merge()
        assert torch.equal(layer.weight, held.T if transposed else held)
        assert layer.drift is not None
        lost = float((asked - held).norm())
        assert lost > 0
        assert layer.drift.of_weight == pytest.approx(lost / float(asked.norm()))
        assert layer.drift.of_delta == pytest.approx(lost / float(delta.norm()))
        assert torch.equal(layer(x), layer.running_layer(x))
        layer.unmerge()
        assert layer.drift is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.packed().items())
    assert torch.equal(layer(x), unmerged)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merging_another_adapter_takes_the_first_one_out(scheme: str) -> None:
    layer = adapted(scheme, False, [(0, 18)])
    layer.adapters["other"] = LoraWeights(10, [(0, 18)], 2, lora_alpha=2)
    nn.init.normal_(layer.adapters["other"].lora_B)
    before = layer.weight
    layer.merge()
    layer.adapter_state.active_adapter = "other"
    layer.merge()
    expected = pack(before + layer.delta_weight("other").detach(), scheme)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in layer.running_layer.packed().items())
    layer.unmerge()
    assert torch.equal(layer.weight, before)


# The model.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_type_trains_through_its_packed_projections(kind: str, scheme: str) -> None:
    model, ids = small_model(kind, 3), token_ids()
    total = count_parameters(model).total
    wanted = {site.path for site in plan(model, LoraConfig(targets=("all",)))}
    sites = plan(model, LoraConfig(targets=("all",)))
    quantise(model, scheme)
    assert wanted <= quantised_layers(model).keys()
    heads = ("classifier", "score", "pooler", "pre_classifier", "embed")
    assert not [path for path in quantised_layers(model) if any(head in path for head in heads)]
    assert count_parameters(model).total == total, "parameters, not packed bytes"
    found = plan(model, LoraConfig(targets=("all",)))
    assert [(site.path, site.slice) for site in found] == [(site.path, site.slice) for site in sites]
    inject(model, LoraConfig(r=2, targets=("q", "v")))
    randomize_lora_b(model)
    other = dequantise(copy.deepcopy(model))
    assert not quantised_layers(other)
    assert count_parameters(other) == count_parameters(model)
    logits, gradients = loss_gradients(model, ids)
    expected_logits, expected = loss_gradients(other, ids)
    assert torch.allclose(logits, expected_logits, atol=QUANTISED_FP32)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=QUANTISED_FP32), name
        assert gradient.any() or "lora_A" in name or "key" in name, f"{name}: no gradient came through"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_dora_has_the_norms_of_a_packed_weight(kind: str, scheme: str) -> None:
    model, ids = quantise(small_model(kind, 3), scheme), token_ids()
    inject(model, LoraConfig(r=2, targets=("q", "v", "ffn_up"), use_dora=True))
    randomize_lora_b(model)
    other = dequantise(copy.deepcopy(model))
    logits, gradients = loss_gradients(model, ids)
    expected_logits, expected = loss_gradients(other, ids)
    assert torch.allclose(logits, expected_logits, atol=QUANTISED_FP32)
    assert any("lora_magnitude_vector" in name for name in gradients)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=QUANTISED_FP32), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_may_read_the_weight_of_a_packed_layer(scheme: str) -> None:
    """T5 reads the precision of `wo`, and Mamba multiplies `dt_proj` itself."""
    ids = token_ids()
    t5 = AutoModelForSeq2SeqLM.from_config(small_config("t5")).eval()
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 100}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    for model, more in ((t5, {"decoder_input_ids": ids}), (mamba, {})):
        quantise(model, scheme)
        assert quantised_layers(model)
        expected = dequantise(copy.deepcopy(model))(ids, **more).logits
        assert torch.allclose(model(ids, **more).logits, expected, atol=QUANTISED_FP32)
    for plain in (nn.Linear(32, 48), Conv1D(48, 32)):
        assert QuantisedLinear(plain, scheme).weight.shape == plain.weight.shape


def loss_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    answer = model(input_ids=ids, labels=torch.tensor([0, 1, 2]))
    answer.loss.backward()
    return answer.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_dequantised_ejected_and_copied(scheme: str) -> None:
    model, ids = quantise(small_model("gpt2", 3), scheme), token_ids()
    bare = model(ids).logits
    inject(model, LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    beside = model(ids).logits
    copied = merge(copy.deepcopy(model))
    assert merge_drift(copied).keys() == lora_layers(model).keys()
    assert not merge_drift(model)
    assert torch.equal(model(ids).logits, beside), "a copy has packed tensors of its own"
    with pytest.raises(ModelError, match="an adapter is merged"):
        dequantise(copied)
    assert torch.equal(unmerge(copied)(ids).logits, beside)
    exact = merge(dequantise(copied))
    assert not merge_drift(exact)
    assert torch.allclose(exact(ids).logits, beside, atol=10 * QUANTISED_FP32)
    assert all(type(layer) is Conv1D for path, layer in projections(eject(exact)).items() if ".h." in path)
    assert torch.equal(eject(model)(ids).logits, bare)


def test_what_cannot_be_quantised() -> None:
    model = small_model("roberta", 3)
    with pytest.raises(ConfigError, match="expected int8, nf4, found 'int4'"):
        quantise(model, "int4")
    with pytest.raises(ConfigError, match="expected int8, found 'nf4'"):
        quantise(model, "nf4", dynamic=True)
    quantise(model, "int8")
    with pytest.raises(ModelError, match="expected a plain base"):
        quantise(model, "int8")
    with pytest.raises(ModelError, match="quantise before inject"):
        quantise(inject(small_model("roberta", 3), LoraConfig()), "int8")


def test_without_bitsandbytes_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"python -m pip install -e '\.\[quantised\]'.*int8"):
        quantise(small_model("roberta", 3), "nf4")


# Files.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_an_adapter_finds_its_base_in_either_form(kind: str, scheme: str, tmp_path: Path) -> None:
    """The same adapter written from either base is the same file; from either it is read back bit for bit."""
    ids = token_ids()
    models = {"plain": small_model(kind, 3), "packed": quantise(small_model(kind, 3), scheme)}
    for name, model in models.items():
        torch.manual_seed(5)
        inject(model, LoraConfig(r=2, targets=("all",)))
        randomize_lora_b(model)
        save_adapter(model, tmp_path / name, task="sst2")
    files = {name: read_adapter(tmp_path / name) for name in models}
    assert files["plain"].metadata == files["packed"].metadata
    assert files["plain"].config == files["packed"].config
    assert all(torch.equal(files["plain"].tensors[key], tensor) for key, tensor in files["packed"].tensors.items())
    for name, model in models.items():
        other = small_model(kind, 3) if name == "plain" else quantise(small_model(kind, 3), scheme)
        for folder in models:
            fresh = copy.deepcopy(other)
            assert torch.equal(load_adapter(fresh, tmp_path / folder)(ids).logits, model(ids).logits)
            save_adapter(merge(fresh), tmp_path / "again")
            assert read_adapter(tmp_path / "again").metadata.fingerprint == files["plain"].metadata.fingerprint
    with pytest.raises(AdapterError, match="was trained on another base"):
        load_adapter(quantise(small_model(kind, 3, seed=5), scheme), tmp_path / "plain")
    load_adapter(quantise(small_model(kind, 3).to(torch.bfloat16), scheme), tmp_path / "plain")


def test_a_base_that_an_adapter_was_merged_into_is_another_base(tmp_path: Path) -> None:
    model = inject(quantise(small_model("roberta", 3), "int8"), LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    save_adapter(model, tmp_path)
    merged = eject(merge(model))
    with pytest.raises(AdapterError, match="was trained on another base"):
        load_adapter(merged, tmp_path)


# Configs, runs and prediction.


def test_a_config_that_would_train_packed_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.quantised=nf4: train.method=full"):
        load_config("rule_sentiment.yaml", ["model.quantised=nf4", "train.method=full"])
    with pytest.raises(ConfigError, match=r"model.quantised: expected one of int8, nf4, found 'int4'"):
        load_config("rule_sentiment.yaml", ["model.quantised=int4"])
    assert load_config("rule_sentiment.yaml", ["model.quantised=null"]).model.quantised is None
    assert load_config("rule_sentiment.yaml", ["model.quantised=int8", "train.method=head"]).model.quantised == "int8"


@pytest.mark.full
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_on_a_packed_base_resumes_scores_and_predicts(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = load_config("rule_sentiment.yaml", ["model.precision=fp32", f"model.quantised={scheme}"]).to_dict()
    sections["train"] |= {"epochs": 2, "batch_size": 16, "hf": {"save_total_limit": 2}}
    sections["output"] |= {"dir": str(tmp_path), "plots": False, "name": "run"}
    config = RunConfig.from_dict(sections)
    task = get_task("rule-sentiment")
    rows = {split: part.select(range(96)) for split, part in task.load(None, task.splits).items()}
    run = train(config, rows=rows)
    assert run.record.parameters["total"] > 4e6
    first, *_ = sorted((run.folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    ended = read_adapter(run.weights).tensors
    sections["output"]["overwrite"] = True  # the record and the newer checkpoints
    config = RunConfig.from_dict(sections)
    again = read_adapter(train(config, resume=str(first), rows=rows).weights).tensors
    assert all(torch.equal(again[key], tensor) for key, tensor in ended.items())

    saved = find_saved_model(run.weights)
    predictor = Predictor.load(saved)
    assert len(quantised_layers(predictor.model)) == 6 * predictor.model.config.num_hidden_layers
    scores, _ = evaluate(predictor, {"validation": rows["validation"]})["validation"]
    assert scores == run.record.metrics["validation"]
    texts = {column: list(rows["validation"][column]) for column in task.text_columns}
    exact = Predictor.load(saved).logits(texts)
    integers = Predictor.load(saved, "int8")
    assert not lora_layers(integers.model)
    assert not adapter_heads(integers.model)
    assert all(layer.dynamic for layer in quantised_layers(integers.model).values())

    capsys.readouterr()
    words = ["--adapter", str(run.weights), "--precision", "int8", "--text", texts[task.text_columns[0]][0]]
    assert main(words, verb="predict") == 0
    answer = json.loads(capsys.readouterr().out)
    shown = integers.predict({column: values[:1] for column, values in texts.items()})[0]
    assert answer["probabilities"] == shown["probabilities"]

    def moved() -> float:
        return float(np.linalg.norm(integers.logits(texts) - exact) / np.linalg.norm(exact))

    assert 0 < moved() <= INT8_MODEL_RTOL
    for layer in quantised_layers(integers.model).values():
        layer.scales.fill_(float(layer.scales.mean()))
    assert moved() > INT8_MODEL_RTOL, "the test could not fail"


def test_products_of_integers_are_near_and_not_without_a_scale() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 48).requires_grad_(False), torch.randn(2, 5, 64)
    plain.weight *= torch.linspace(0.1, 2, 48)[:, None]
    x *= torch.linspace(0.1, 10, 5)[:, None]
    layer = QuantisedLinear(plain, "int8", dynamic=True)
    with torch.no_grad():
        found, expected = layer(x), plain(x)
        error = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert float(error.max()) <= INT8_LAYER_RTOL, "each token has a scale of its own"
        layer.scales.fill_(float(layer.scales.mean()))
        assert not float((layer(x) - expected).abs().max()) <= INT8_LAYER_RTOL * float(expected.abs().max())
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    gradient = torch.autograd.grad(layer(x.requires_grad_(True)).sum(), x)[0]
    assert torch.allclose(gradient, layer.dequantise().sum(0).expand_as(x), atol=QUANTISED_FP32), "weights alone"


def test_integers_are_multiplied_in_fp32_where_their_products_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN does without VNNI: each pair of products is added in 16 bits."""

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products = (a.int() + 128)[:, None] * b.T.int()[None]
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(-1) - 128 * b.int().sum(0)

    torch.manual_seed(0)
    layer = QuantisedLinear(nn.Linear(64, 48), "int8", dynamic=True)
    x = torch.randn(10, 64)
    expected = layer(x)
    monkeypatch.setattr(quantization, "_multiply_int8", saturating)
    quantization._integer_products_are_exact.cache_clear()
    torch.testing.assert_close(layer(x), expected, atol=QUANTISED_FP32, rtol=0)
    monkeypatch.undo()
    quantization._integer_products_are_exact.cache_clear()


def test_load_base_quantises_what_the_config_says() -> None:
    model = ModelConfig(name="tiny-roberta", precision="bf16", quantised="int8")
    base = load_base(model, get_task("rule-sentiment"))
    layers = quantised_layers(base)
    assert len(layers) == 6 * base.config.num_hidden_layers
    assert base.dtype == torch.bfloat16
    assert not quantised_layers(load_base(replace(model, quantised=None), get_task("rule-sentiment")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_computes_the_same_from_the_same_tensors(scheme: str) -> None:
    layer, x = adapted(scheme, False, [(0, 18)]), torch.randn(4, 10)
    expected = outcome(layer, x)
    weight = layer.weight
    on_gpu = copy.deepcopy(layer).to("cuda")
    assert torch.equal(on_gpu.weight.cpu(), weight)
    y = on_gpu(x.cuda())
    assert torch.allclose(y.cpu(), expected[0], atol=QUANTISED_BF16_RTOL)
    on_gpu.merge()
    on_gpu.unmerge()
    assert torch.equal(on_gpu.weight.cpu(), weight)


@NEEDS_BITSANDBYTES
def test_a_base_that_transformers_packed_is_adapted_beside_its_weights() -> None:
    from bitsandbytes.nn import Linear4bit

    model = small_model("llama").eval()
    for path, module in list(model.base_model.named_modules()):
        if type(module) is nn.Linear and "layers" in path:
            packed = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            packed.load_state_dict(module.state_dict())
            model.base_model.set_submodule(path, packed.to("cpu"))  # moving it packs the weight
    before = model(token_ids()).logits
    inject(model, LoraConfig(r=2, targets=("q", "v")))
    assert torch.allclose(model(token_ids()).logits, before, atol=PARITY_FP32)
    with pytest.raises(AdapterError, match=r"Linear4bit: its weight is packed \(torch.uint8\)"):
        merge(model)


class ScaledLinear(nn.Linear):
    """As transformers' `FP8Linear`: 8-bit floats and a scale beside them, without which they mean nothing."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False)
        self.scale = float(whole.weight.detach().abs().max() / 448)
        self.weight = nn.Parameter((whole.weight.detach() / self.scale).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_a_base_in_float8_is_adapted_beside_its_weights_and_never_merged_without_their_scales() -> None:
    model = small_model("llama").eval()
    for path, module in list(model.base_model.named_modules()):
        if type(module) is nn.Linear and "layers" in path:
            model.base_model.set_submodule(path, ScaledLinear(module))
    before = model(token_ids()).logits
    inject(model, LoraConfig(r=2, targets=("q", "v")))
    assert torch.allclose(model(token_ids()).logits, before, atol=PARITY_FP32)
    model.train()(token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
    with pytest.raises(AdapterError, match=r"ScaledLinear: its weight is packed \(torch.float8_e4m3fn\)"):
        merge(model)
    for variant in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(AdapterError, match="float8"):
            inject(model, LoraConfig(r=2, targets=("q", "v"), **variant), "other")


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_that_transformers_loaded_packed_is_trained_saved_and_loaded(
    kind: str, options: dict[str, bool], tmp_path: Path
) -> None:
    """transformers packs the head of a classifier too: it is unpacked, and the adapter trains it."""
    small_model(kind, 3, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def packed() -> Any:
        quantization = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
        auto = AutoModelForSequenceClassification
        return auto.from_pretrained(tmp_path / "base", quantization_config=quantization, dtype=torch.float32)

    model, ids = inject(packed(), LoraConfig(r=2, targets=("all",))), token_ids()
    plain = packed()
    keep_input_gradients(plain)  # a kernel of some processors cannot multiply matrices as small as these
    Trainer(model, TrainingArguments(str(tmp_path / "out"), report_to="none"))  # refuses what it takes for a plain base
    with use_adapter(model, None):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=PACKED_HEAD_FP32, rtol=0)
    model.train()(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
    assert all(head.modules_to_save["default"].weight.grad.any() for head in list(adapter_heads(model).values())[-1:])
    randomize_lora_b(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(packed(), tmp_path / "adapter")
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("evaluated_before", [False, True])
def test_4_bit_weights_give_gradients_after_an_evaluation(evaluated_before: bool, tmp_path: Path) -> None:
    """On processors with AVX512-BF16, bitsandbytes repacks them in evaluation mode for a kernel without a gradient."""
    small_model("llama", 3, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    auto = AutoModelForSequenceClassification
    base = auto.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    ids, gradients = token_ids(), []
    if evaluated_before:
        with torch.no_grad():
            base.eval()(ids)
    model = inject(base, LoraConfig(r=2, targets=("all",)))
    randomize_lora_b(model)
    for _ in range(2):
        model.zero_grad()
        model.train()(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            model.eval()(ids)
    lowest = [name for name in gradients[0] if ".layers.0." in name and "lora_A" in name]
    assert lowest
    assert all(gradients[0][name].any() for name in lowest)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=PARITY_FP32, rtol=0, msg=name)
