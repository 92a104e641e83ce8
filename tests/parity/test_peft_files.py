"""Adapters that PEFT wrote, over the fields of its config and the classes of models: the same logits here."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.errors import AdapterError
from lora_hf.lora.inject import adapter_heads, eject, merge
from tests.support.model_classes import from_base, outputs_of
from tests.support.peft_settings import save_without_card
from tests.support.small_models import small_config, small_model
from tests.tolerances import MERGE_FP32, PEFT_LOGITS

# Names of projections in the attention of each type.
MODELS = {
    ("bert", "AutoModelForSequenceClassification"): ["query", "value"],
    ("roberta", "AutoModelForTokenClassification"): ["query", "value"],
    ("distilbert", "AutoModelForSequenceClassification"): ["q_lin", "v_lin"],
    ("electra", "AutoModelForQuestionAnswering"): ["query", "value"],
    ("gpt2", "AutoModelForCausalLM"): ["c_attn"],
    ("llama", "AutoModelForCausalLM"): ["q_proj", "v_proj"],
    ("qwen3", "AutoModelForSequenceClassification"): ["q_proj", "v_proj"],
    ("phi", "AutoModel"): ["q_proj", "v_proj"],
    ("t5", "AutoModelForSeq2SeqLM"): ["q", "v"],
    ("bart", "AutoModelForSequenceClassification"): ["q_proj", "v_proj"],
}
QUICK = (("roberta", "AutoModelForTokenClassification"),)
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.0\..*(q|query|q_lin|c_attn|q_proj|Attention\.q)"},
    "exclude_modules": {"exclude_modules": r".*(value|v_lin|v_proj|\.v)"},
    "excluded names": {"target_modules": "all-linear", "exclude_modules": ["query", "q_proj", "q"]},
    "layers": {"layers_to_transform": [0]},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": ["layer", "layers", "h", "block"]},
    "patterns": {"rank_pattern": {"query": 2, "q_proj": 2}, "alpha_pattern": {r".*0.*": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "embeddings to save": {"modules_to_save": ["word_embeddings", "embed_tokens", "wte", "shared"]},
    "norms to save": {"modules_to_save": ["LayerNorm", "norm", "ln_f", "sa_layer_norm", "layer_norm"]},
    "tokens": {"trainable_token_indices": [7, 9, 11]},
}


def peft_can(kind: str, field: str) -> bool:
    """Whether PEFT itself can do it with this model."""
    if field == "lora_bias":
        return kind not in ("llama", "qwen3", "t5")  # whose projections have no bias
    if field in ("all-linear", "excluded names"):
        return kind not in ("roberta", "electra", "distilbert", "bart")  # it would adapt the head that it saves whole
    if (kind, field) == ("phi", "layers"):
        return False  # its pattern wants a name before `layers`
    return kind not in ("t5", "bart") or field not in ("embeddings to save", "tokens", "layers_pattern")


CASES = [
    pytest.param(*model, field, marks=() if model in QUICK else pytest.mark.full, id=f"{model[0]}-{field}")
    for model in MODELS
    for field in FIELDS
    if peft_can(model[0], field)
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind, auto in MODELS:
        torch.manual_seed(0)
        saved = auto if auto.endswith("LM") else "AutoModel"  # PEFT leaves a new language model head out of the file
        getattr(transformers, saved).from_config(small_config(kind)).save_pretrained(folder / kind)
    return folder


def save_with_peft(base: Path, auto: str, modules: list[str], fields: dict[str, Any], folder: Path) -> torch.Tensor:
    """Saves an adapter of PEFT with random weights, and returns what it computes."""
    types = {
        "AutoModelForSequenceClassification": "SEQ_CLS",
        "AutoModelForTokenClassification": "TOKEN_CLS",
        "AutoModelForQuestionAnswering": "QUESTION_ANS",
        "AutoModelForCausalLM": "CAUSAL_LM",
        "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
        "AutoModel": "FEATURE_EXTRACTION",
    }
    values = {"task_type": types[auto], "r": 4, "lora_alpha": 6, "target_modules": modules, **fields}
    values |= {"fan_in_fan_out": True} if base.name == "gpt2" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(from_base(auto, base, seed=1), peft.LoraConfig(**values))
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        save_without_card(model, folder)
    with torch.no_grad():
        return outputs_of(model.get_base_model().eval())


@pytest.mark.parametrize(("kind", "auto", "field"), CASES)
def test_we_load_what_peft_wrote(kind: str, auto: str, field: str, bases: Path, tmp_path: Path) -> None:
    fields = FIELDS[field]
    if kind == "bart":  # PEFT knows only heads that are called classifier or score
        fields = fields | {"modules_to_save": [*fields.get("modules_to_save", []), "classification_head"]}
    theirs = save_with_peft(bases / kind, auto, MODELS[kind, auto], fields, tmp_path)
    scale = float(theirs.abs().max())
    model = load_adapter(from_base(auto, bases / kind, seed=2), tmp_path)
    with torch.no_grad():
        found = outputs_of(model)
        assert torch.allclose(found, theirs, rtol=0, atol=PEFT_LOGITS * scale)
        plain = outputs_of(from_base(auto, bases / kind, seed=2))
        assert not torch.allclose(plain, theirs, rtol=0, atol=1e-3 * scale), "the adapter changes nothing"
        save_adapter(model, tmp_path / "again")
        again = load_adapter(from_base(auto, bases / kind, seed=3), tmp_path / "again")
        assert torch.equal(outputs_of(again), found)
        if field != "tokens":
            merged = outputs_of(eject(merge(again)).eval())
            assert torch.allclose(merged, theirs, rtol=0, atol=MERGE_FP32 * max(scale, 1))


def test_a_field_that_is_switched_on_and_unknown_is_refused_by_name(bases: Path, tmp_path: Path) -> None:
    save_with_peft(bases / "bert", "AutoModelForSequenceClassification", ["query"], {}, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for value, refused in ((False, False), (None, False), (True, True), ({"a": 1}, True)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_new_scaling": value}))
        model = from_base("AutoModelForSequenceClassification", bases / "bert", seed=2)
        if refused:
            with pytest.raises(AdapterError, match=r"use_new_scaling=.* not supported"):
                load_adapter(model, tmp_path)
        else:
            load_adapter(model, tmp_path)


def test_a_module_that_peft_saved_within_another_is_refused(bases: Path, tmp_path: Path) -> None:
    auto, base = "AutoModelForTokenClassification", bases / "roberta"
    theirs = save_with_peft(base, auto, ["query"], {"modules_to_save": ["embeddings"]}, tmp_path)
    with pytest.raises(AdapterError, match=r"names roberta.embeddings.word_embeddings and a module around it"):
        load_adapter(from_base(auto, base, seed=2), tmp_path)
    with contextlib.suppress(KeyError):  # what PEFT's own reader says
        again: Any = peft.PeftModel.from_pretrained(from_base(auto, base, seed=2), tmp_path)
        assert not torch.allclose(outputs_of(again.get_base_model().eval()), theirs, atol=1e-3), "PEFT reads it again"


def test_embeddings_that_peft_saved_unchanged_are_those_of_the_base(bases: Path, tmp_path: Path) -> None:
    theirs = save_with_peft(bases / "llama", "AutoModelForCausalLM", ["q_proj"], {}, tmp_path)
    base = from_base("AutoModelForCausalLM", bases / "llama", seed=2)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors |= {f"base_model.model.{name}": base.get_parameter(name).detach().clone() for name in names}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = load_adapter(from_base("AutoModelForCausalLM", bases / "llama", seed=2), tmp_path)
    assert torch.allclose(outputs_of(model), theirs, rtol=0, atol=PEFT_LOGITS * float(theirs.abs().max()))
    assert not adapter_heads(model)
    changed = "base_model.model.lm_head.weight"
    save_file(tensors | {changed: tensors[changed] * 2}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    model = load_adapter(from_base("AutoModelForCausalLM", bases / "llama", seed=2), tmp_path)
    assert list(adapter_heads(model)) == ["lm_head"], "PEFT saves a resized head without naming it"
    assert torch.allclose(outputs_of(model), 2 * theirs, rtol=0, atol=PEFT_LOGITS * 4 * float(theirs.abs().max()))


SAVED_EMBEDDINGS: dict[str, dict[str, Any]] = {
    "unnamed": {},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings to save": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [100, 7, 101, 102]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("field", SAVED_EMBEDDINGS)
def test_an_adapter_of_peft_on_a_resized_vocabulary(field: str, tied: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    small_model("llama", tie_word_embeddings=tied).save_pretrained(base)
    theirs = save_resized(base, SAVED_EMBEDDINGS[field], tmp_path / "adapter")
    scale = float(theirs.abs().max())
    for seed in (1, 2):  # the new rows are equal to PEFT's, or others
        plain = resized(base, seed)
        assert not torch.allclose(outputs_of(plain), theirs, rtol=0, atol=1e-2 * scale)
        found = outputs_of(load_adapter(plain, tmp_path / "adapter"))
        assert torch.allclose(found, theirs, rtol=0, atol=PEFT_LOGITS * scale)
    save_adapter(plain, tmp_path / "again")
    assert torch.equal(outputs_of(load_adapter(resized(base, seed=3), tmp_path / "again")), found)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("field", ["modules_to_save", "tokens"])
def test_peft_saves_embeddings_beside_what_it_trains(field: str, tied: bool, tmp_path: Path) -> None:
    small_model("llama", tie_word_embeddings=tied, vocab_size=103).save_pretrained(tmp_path / "base")
    theirs = save_resized(tmp_path / "base", SAVED_EMBEDDINGS[field], tmp_path / "adapter", embeddings=True)
    found = outputs_of(load_adapter(resized(tmp_path / "base"), tmp_path / "adapter"))
    assert torch.allclose(found, theirs, rtol=0, atol=PEFT_LOGITS * float(theirs.abs().max()))


def test_new_rows_that_peft_did_not_save_are_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    small_model("llama").save_pretrained(base)
    theirs = save_resized(base, {"target_modules": ["embed_tokens", "q_proj"]}, adapter)
    with pytest.raises(AdapterError, match=r"new tokens in model.embed_tokens and lm_head.*Save the resized"):
        load_adapter(resized(base, seed=2), adapter)
    resized(base).save_pretrained(tmp_path / "resized")
    found = outputs_of(load_adapter(resized(tmp_path / "resized"), adapter))
    assert torch.allclose(found, theirs, rtol=0, atol=PEFT_LOGITS * float(theirs.abs().max()))


def resized(base: Path, seed: int = 1) -> Any:
    """The base with a vocabulary of 103 tokens."""
    model = from_base("AutoModelForCausalLM", base, seed)
    torch.manual_seed(seed)
    model.resize_token_embeddings(103, mean_resizing=False)
    return model.eval()


@torch.no_grad()
def save_resized(base: Path, fields: dict[str, Any], folder: Path, embeddings: Any = "auto") -> torch.Tensor:
    """Saves an adapter of PEFT on the resized base, and returns what it computes."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(resized(base), config)
        for parameter in model.parameters():
            parameter.data += parameter.requires_grad * torch.randn_like(parameter)
        model.save_pretrained(str(folder), save_embedding_layers=embeddings)
    return outputs_of(model.get_base_model().eval())


def test_a_file_without_the_head_needs_a_base_whose_head_is_trained(bases: Path, tmp_path: Path) -> None:
    auto = "AutoModelForSequenceClassification"
    fine_tuned = from_base(auto, bases / "bert", seed=1)
    fine_tuned.save_pretrained(tmp_path / "base")
    model: Any = peft.get_peft_model(
        fine_tuned, peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    theirs = outputs_of(model.get_base_model().eval()).detach()
    ours = load_adapter(from_base(auto, tmp_path / "base", seed=2), tmp_path / "adapter")
    assert torch.allclose(outputs_of(ours), theirs, rtol=0, atol=PEFT_LOGITS * float(theirs.abs().max()))
    assert not adapter_heads(ours)
    with pytest.raises(AdapterError, match=r"missing: base_model.model.classifier.weight"):
        load_adapter(from_base(auto, bases / "bert", seed=2), tmp_path / "adapter")
