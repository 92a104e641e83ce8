"""Parity with peft for the variants of LoRA: logits, gradients, and files in both directions."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError
from lora_hf.lora.inject import inject, lora_layers, merge
from tests.support.peft_parameters import paired_parameters
from tests.support.small_models import small_model, token_ids
from tests.tolerances import FILE_ROUNDTRIP, MERGE_FP32, PARITY_FP32

QUERIES = "encoder.layer.*.attention.self.query"
# name: model, our config, and that of peft with the same target modules
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rslora": ("roberta", {"use_rslora": True}, {"use_rslora": True}),
    "rank_pattern": (
        "roberta",
        {"rank_pattern": {"q": 2, "encoder.layer.1.attention.self.value": 6}, "alpha_pattern": {QUERIES: 3.0}},
        {"rank_pattern": {"query": 2, "layer.1.attention.self.value": 6}, "alpha_pattern": {"query": 3.0}},
    ),
    "rslora with rank_pattern": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v": 2}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ),
    "layers": ("roberta", {"layers": (-1,)}, {"layers_to_transform": [1]}),
    "dora": ("roberta", {"use_dora": True}, {"use_dora": True}),
    "dora on Conv1D": ("gpt2", {"use_dora": True, "use_rslora": True}, {"use_dora": True, "use_rslora": True}),
    "gaussian": ("roberta", {"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "pissa": ("roberta", {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa on Conv1D": ("gpt2", {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa with rslora": (
        "llama",
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"init_lora_weights": "pissa", "use_rslora": True},
    ),
    "olora": ("roberta", {"init_lora_weights": "olora"}, {"init_lora_weights": "olora"}),
    "bias of lora": ("roberta", {"bias": "lora_only"}, {"bias": "lora_only"}),
    "bias of lora on Conv1D, dora": (
        "gpt2",
        {"bias": "lora_only", "use_dora": True},
        {"bias": "lora_only", "use_dora": True},
    ),
    "embeddings": ("roberta", {"targets": ("embeddings", "q")}, {"target_modules": ["word_embeddings", "query"]}),
    "tied embeddings": (
        "gpt2",
        {"targets": ("transformer.wte",), "use_rslora": True},
        {"target_modules": ["wte"], "use_rslora": True, "fan_in_fan_out": False},
    ),
    "all biases": ("roberta", {"bias": "all"}, {"bias": "all"}),
    "all biases on Conv1D": ("gpt2", {"bias": "all"}, {"bias": "all"}),
}
# These differ from plain LoRA only in their target modules or initial values.
PLAIN = {"gaussian", "layers", "embeddings", "tied embeddings"}
TARGETS = {
    "roberta": (("q", "v"), ["query", "value"]),
    "gpt2": (("h.*.attn.c_attn", "o"), ["c_attn", "attn.c_proj"]),
    "llama": (("q", "v"), ["q_proj", "v_proj"]),
}


def base_of(kind: str) -> nn.Module:
    return small_model(kind, 3 if kind == "roberta" else None)


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """Our model and that of peft, before training."""
    kind, ours, theirs = VARIANTS[name]
    targets, modules = TARGETS[kind]
    base = base_of(kind)
    values = {
        "task_type": "SEQ_CLS" if kind == "roberta" else "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": modules,
        "fan_in_fan_out": kind == "gpt2",
    }
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**(values | theirs))).eval()
    return inject(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "targets": targets, **ours})), wrapped


def randomize(ours: nn.Module, theirs: nn.Module, std: float = 0.1) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Adds the same random values to the parameters of both."""
    matched = paired_parameters(ours, theirs)
    generator = torch.Generator().manual_seed(3)
    for parameter, other in matched.values():
        other.data.copy_(other.data + torch.randn(other.shape, generator=generator) * std)
        parameter.data.copy_(other.data)
    return matched


def gradients(model: nn.Module) -> torch.Tensor:
    logits = model(token_ids()).logits
    logits.square().sum().backward()
    return logits.detach()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_equal_those_of_peft(name: str) -> None:
    ours, theirs = both(name)
    start = ours(token_ids()).logits.detach()
    assert torch.allclose(start, base_of(VARIANTS[name][0])(token_ids()).logits, atol=PARITY_FP32, rtol=0)
    assert torch.allclose(start, theirs(token_ids()).logits, atol=PARITY_FP32, rtol=0)
    matched = randomize(ours, theirs)
    found, expected = gradients(ours), gradients(theirs)
    assert len(matched) == sum(parameter.grad is not None for parameter in theirs.parameters())
    assert torch.allclose(found, expected, atol=PARITY_FP32, rtol=0)
    assert not torch.allclose(found, start, atol=100 * PARITY_FP32, rtol=0), "the logits must change"
    for key, (parameter, other) in matched.items():
        assert parameter.grad.any(), key
        scale = max(1.0, float(other.grad.abs().max()))
        assert torch.allclose(parameter.grad, other.grad, atol=PARITY_FP32 * scale, rtol=0), key


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - PLAIN))
def test_plain_lora_with_the_same_weights_gives_other_logits(name: str) -> None:
    """Otherwise the parity test above would also pass without the variant."""
    ours, theirs = both(name)
    randomize(ours, theirs)
    kind = VARIANTS[name][0]
    plain = inject(base_of(kind), LoraConfig(r=4, lora_alpha=6, targets=TARGETS[kind][0]))
    for path, layer in lora_layers(plain).items():
        weights = lora_layers(ours)[path].adapters["default"]
        rank = min(4, weights.r)
        layer.adapters["default"].lora_A.data[:rank] = weights.lora_A[:rank]
        layer.adapters["default"].lora_B.data[:, :rank] = weights.lora_B[:, :rank]
    assert not torch.allclose(plain(token_ids()).logits, ours(token_ids()).logits, atol=100 * PARITY_FP32, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_we_and_peft_load_our_file_on_the_original_base(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name)
    randomize(ours, theirs)
    logits = ours(token_ids()).logits
    save_adapter(ours, tmp_path)
    kind = VARIANTS[name][0]
    read = peft.PeftModel.from_pretrained(base_of(kind), str(tmp_path)).eval()
    assert torch.allclose(read(token_ids()).logits, logits, atol=PARITY_FP32, rtol=0)
    adapted = {path for path, module in read.base_model.model.named_modules() if hasattr(module, "lora_embedding_A")}
    assert adapted == set(lora_layers(ours))
    again = load_adapter(base_of(kind), tmp_path)
    assert torch.allclose(again(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    if name == "tied embeddings":
        with pytest.raises(
            AdapterError, match=r"transformer.wte: the input embeddings and the output head share its weight"
        ):
            merge(again)
        assert torch.equal(again(token_ids()).logits, logits)
        return
    assert torch.allclose(merge(again)(token_ids()).logits, logits, atol=MERGE_FP32, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_we_load_a_file_saved_by_peft(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name)
    randomize(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft cannot look up a base without a name
        theirs.save_pretrained(str(tmp_path))
    read = load_adapter(base_of(VARIANTS[name][0]), tmp_path)
    assert set(lora_layers(read)) == set(lora_layers(ours))
    assert torch.allclose(read(token_ids()).logits, theirs(token_ids()).logits, atol=PARITY_FP32, rtol=0)
    save_adapter(read, tmp_path / "again")
    again = load_adapter(base_of(VARIANTS[name][0]), tmp_path / "again")
    assert torch.allclose(again(token_ids()).logits, read(token_ids()).logits, atol=FILE_ROUNDTRIP, rtol=0)


def test_unsupported_configs_are_rejected(tmp_path: Path) -> None:
    for index, variant in enumerate(({"use_dora": True}, {"init_lora_weights": "pissa"})):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "q_proj"], **variant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(base_of("llama"), config).save_pretrained(str(tmp_path / str(index)))
        with pytest.raises(AdapterError, match=r"model.embed_tokens: an embedding supports neither use_dora nor"):
            load_adapter(base_of("llama"), tmp_path / str(index))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    peft.get_peft_model(base_of("llama"), config).save_pretrained(str(tmp_path / "random"))
    with pytest.raises(AdapterError, match=r"belongs to a base that PEFT changed and did not save"):
        load_adapter(base_of("llama"), tmp_path / "random")


def test_we_load_a_pissa_file_converted_by_peft(tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` saves plain LoRA with twice the rank, on the original base."""
    ours, theirs = both("pissa with rslora")
    theirs.peft_config["default"].init_lora_weights = True  # PEFT saves the initial adapter as a plain one
    theirs.save_pretrained(str(tmp_path / "start"))
    randomize(ours, theirs)
    theirs.save_pretrained(str(tmp_path / "trained"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    read = load_adapter(base_of("llama"), tmp_path / "trained")
    assert torch.allclose(read(token_ids()).logits, ours(token_ids()).logits, atol=PARITY_FP32, rtol=0)
