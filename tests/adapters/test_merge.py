"""Merged models: the base comes back bit for bit, the folder is plain and answers the same, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    pipeline,
)

from lora_hf.adapters import merge as merge_module
from lora_hf.adapters import save_load
from lora_hf.adapters.merge import merge_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import load_adapter, plain_model, save_adapter
from lora_hf.core.config.schema import LoraConfig, ModelConfig
from lora_hf.core.errors import AdapterError, ConfigError, DataError
from lora_hf.core.records import MERGE_FILE, MergeRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.inference.generate import Generator
from lora_hf.lora.fingerprint import base_tensors
from lora_hf.lora.inject import (
    adapter_heads,
    add_weights,
    inject,
    inject_head,
    lora_layers,
    merge,
    set_adapter,
    unmerge,
)
from lora_hf.models.load import DTYPES, load_base
from tests.support.model_classes import outputs_of
from tests.support.small_models import SHAPES, randomize_lora_b, small_config, small_model, token_ids
from tests.support.word_tokenizer import word_tokenizer
from tests.tolerances import INT8_MODEL_RTOL, MERGE_BF16, MERGE_FP16, MERGE_FP32

# kind, num_labels, targets: nn.Linear, Conv1D, and slices of a fused projection.
PLACES: dict[str, tuple[str, int | None, tuple[str, ...]]] = {
    "linear": ("roberta", 3, ("all",)),
    "conv1d": ("gpt2", None, ("o", "ffn")),
    "fused slices": ("gpt2", None, ("q", "v")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_merges_gives_the_base_back_bit_for_bit(place: str, dtype: str) -> None:
    kind, num_labels, targets = PLACES[place]
    model = small_model(kind, num_labels).to(DTYPES[dtype])
    for name in ("one", "two"):
        inject(model, LoraConfig(r=3, lora_alpha=5, targets=targets), name)
    randomize_lora_b(model)
    before = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    subtracted = {path: layer.weight.clone() for path, layer in lora_layers(model).items()}
    for cycle in range(20):
        name = ("one", "two")[cycle % 2]
        merge(set_adapter(model, name))
        for path, layer in lora_layers(model).items():
            delta = layer.delta_weight(name).detach()
            delta = delta.T if place != "linear" else delta
            assert torch.equal(layer.weight, (before_of(before, model, path).float() + delta).to(DTYPES[dtype]))
            merged = (subtracted[path].float() + delta).to(DTYPES[dtype])
            subtracted[path] = (merged.float() - delta).to(DTYPES[dtype])
        if cycle % 3 == 0:
            merge(model)
            model.train().eval()
        if cycle % 2 == 0:  # else set_adapter takes the merged one out
            unmerge(model)
            assert all(torch.equal(tensor, before[key]) for key, tensor in base_tensors(model).items())
    unmerge(model)
    assert all(torch.equal(layer.weight, before_of(before, model, path)) for path, layer in lora_layers(model).items())
    drifted = [not torch.equal(weight, before_of(before, model, path)) for path, weight in subtracted.items()]
    assert all(drifted), "unmerging by subtraction would not pass"


def before_of(before: dict[str, torch.Tensor], model: Any, path: str) -> torch.Tensor:
    return before[f"{path.removeprefix(f'{model.base_model_prefix}.')}.weight"]


def test_a_head_that_is_the_embeddings_is_not_merged() -> None:
    model = inject(small_model("gpt2"), LoraConfig(targets=("q",)))
    add_weights(model, "lm_head", "default", [(0, 100)], 2, 2)
    randomize_lora_b(set_adapter(model, "default"))
    before = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    with pytest.raises(AdapterError, match="lm_head: the input embeddings and the output head share its weight"):
        merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())


# Models whose inputs or outputs differ from those of a classifier or a causal language model.
KINDS = [
    ("roberta", AutoModelForQuestionAnswering),
    ("bart", AutoModelForQuestionAnswering),
    ("bart", AutoModelForSequenceClassification),
    ("t5", AutoModelForSeq2SeqLM),
    ("marian", AutoModelForSeq2SeqLM),
    ("gemma3", AutoModelForCausalLM),
]


# A config in two parts, so that the outer one has no vocabulary.
_GEMMA3 = {
    "text_config": {"vocab_size": 100, **SHAPES["gemma3_text"]},
    "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}


def saved_adapter(folder: Path, kind: str, std: float = 0.05, lora: bool = True) -> Path:
    """An adapter of a bundled base that is as different from a fresh one as training makes it."""
    name, task = ("tiny-roberta", "rule-sentiment") if kind == "roberta" else ("tiny-gpt2", "rule-restaurants")
    model = load_base(ModelConfig(name=name, precision="fp32"), get_task(task))
    inject(model, LoraConfig(r=4, targets=("q", "v", "ffn"))) if lora else inject_head(model)
    randomize_lora_b(model, std=std)
    torch.manual_seed(4)
    for head in adapter_heads(model).values():
        for parameter in head.modules_to_save.parameters():
            nn.init.normal_(parameter, std=0.1)
    return save_adapter(model, folder, task=task)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("classifier") / "adapter", "roberta")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("writer") / "adapter", "gpt2")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", MERGE_FP32), ("bf16", MERGE_BF16), ("fp16", MERGE_FP16)])
def test_the_folder_is_a_plain_classifier(classifier: Path, dtype: Any, tolerance: float, tmp_path: Path) -> None:
    record = merge_adapter(find_saved_model(classifier), tmp_path / "merged", dtype)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.dtype == DTYPES[dtype]
    assert (model.config.id2label, model.config.num_labels) == ({0: "negative", 1: "positive"}, 2)
    base = load_base(ModelConfig(name="tiny-roberta", precision="fp32"), get_task("rule-sentiment")).eval()
    ids = token_ids()
    bare = base(ids).logits
    expected = load_adapter(base, classifier)(ids).logits.detach()
    found = model.float()(ids).logits.detach()
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))
    assert float((bare - expected).detach().abs().max()) > 0.1, "the adapter does something"
    answer = pipeline("text-classification", model=str(tmp_path / "merged"))("A fine film.")
    assert answer[0]["label"] in ("negative", "positive")
    assert MergeRecord.load(tmp_path / "merged" / MERGE_FILE) == record
    assert (record.dtype, record.base, record.probe) == (dtype, "tiny-roberta", {"drawn": 8, "real": 8, "seed": 0})
    assert 0 < record.drift["relative"] <= record.drift["tolerance"] == merge_module.TOLERANCES[dtype]
    saved = find_saved_model(tmp_path / "merged")
    assert (saved.is_full_model, saved.task.name, saved.model.precision) == (True, "rule-sentiment", dtype)


def test_the_weights_are_the_sum_rounded_once(writer: Path, tmp_path: Path) -> None:
    merge_adapter(find_saved_model(writer), tmp_path / "merged", "bf16")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_base(ModelConfig(name="tiny-gpt2", precision="fp32"), get_task("rule-restaurants"))
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    load_adapter(base, writer)
    for path, layer in lora_layers(base).items():
        delta = layer.delta_weight("default").detach().T
        assert torch.equal(written.pop(f"{path}.weight"), (plain[f"{path}.weight"] + delta).bfloat16())
    assert all(torch.equal(tensor, plain[name].bfloat16()) for name, tensor in written.items()), "the rest is the base"


def test_the_folder_is_a_plain_writer_and_its_embeddings_stay_tied(writer: Path, tmp_path: Path) -> None:
    merge_adapter(find_saved_model(writer), tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert "transformer.wte.weight" in tensors
    assert "lm_head.weight" not in tensors, "one copy"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.transformer.wte.weight
    base = load_base(ModelConfig(name="tiny-gpt2", precision="fp32"), get_task("rule-restaurants")).eval()
    assert torch.equal(model.transformer.wte.weight, base.transformer.wte.weight)
    expected = load_adapter(base, writer)(token_ids()).logits.detach()
    found = model(token_ids()).logits.detach()
    assert float((found - expected).abs().max()) <= MERGE_FP32 * max(1.0, float(expected.abs().max()))
    text = pipeline("text-generation", model=str(tmp_path / "merged"))("The Vaults", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].startswith("The Vaults")
    contexts = [get_task("rule-restaurants").context("name[Aromi], food[Italian]")]  # type: ignore[attr-defined]
    texts = []
    for folder in (writer, tmp_path / "merged"):
        saved = find_saved_model(folder)
        texts.append(next(iter(Generator.load(saved).generate(contexts, saved.generate))).text)
    assert texts[0] == texts[1]


def test_an_adapter_that_is_only_a_head_merges_too(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path / "adapter", "roberta", lora=False)
    merge_adapter(find_saved_model(folder), tmp_path / "merged")
    rows = {"sentence": ["A fine film.", "A dull film."]}
    answers = [Predictor.load(find_saved_model(place), "fp32").logits(rows) for place in (folder, tmp_path / "merged")]
    assert answers[0] == pytest.approx(answers[1], abs=MERGE_FP32)


def test_an_adapter_that_is_only_a_head_runs_in_int8_too(tmp_path: Path) -> None:
    saved = find_saved_model(saved_adapter(tmp_path / "adapter", "roberta", lora=False))
    rows = {"sentence": ["A fine film.", "A dull film."]}
    exact, found = (Predictor.load(saved, precision).logits(rows) for precision in ("fp32", "int8"))
    assert 0 < np.linalg.norm(found - exact) <= INT8_MODEL_RTOL * np.linalg.norm(exact)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "auto"), KINDS)
def test_models_of_every_kind_are_compared(
    kind: str, auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **_GEMMA3) if kind == "gemma3" else small_config(kind)
    auto.from_config(config).save_pretrained(tmp_path / "base")
    word_tokenizer(ends=True, pad_token="<pad>").save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base").eval()
    bare = outputs_of(model)
    randomize_lora_b(inject(model, LoraConfig(r=2, targets=("q", "v"))))
    expected = outputs_of(model)
    saved = find_saved_model(save_adapter(model, tmp_path / "adapter"))
    record = merge_adapter(saved, tmp_path / "merged")
    assert record.drift["relative"] <= merge_module.TOLERANCES["fp32"]
    found = outputs_of(auto.from_pretrained(tmp_path / "merged").eval())
    assert float((found - expected).abs().max()) <= MERGE_FP32 * max(1.0, float(expected.abs().max()))
    assert not torch.allclose(bare, expected, atol=10 * MERGE_FP32), "the adapter does something"
    monkeypatch.setattr(save_load, "merge", lambda model: model)  # a merge that forgets the adapter
    with pytest.raises(AdapterError, match="not written: merging in fp32"):
        merge_adapter(saved, tmp_path / "wrong")


def test_the_merged_head_is_that_of_the_active_adapter() -> None:
    model = small_model("roberta", 3)
    for name in ("one", "two"):
        inject(model, LoraConfig(targets=("q",)), name)
    randomize_lora_b(model)
    for parameter in adapter_heads(model)["classifier"].modules_to_save["one"].parameters():
        nn.init.normal_(parameter)
    expected = set_adapter(model, "one")(token_ids()).logits
    assert torch.allclose(plain_model(model)(token_ids()).logits, expected, atol=MERGE_FP32)
    assert not lora_layers(model)
    assert not adapter_heads(model)


def test_a_drift_that_rounding_does_not_explain_writes_nothing(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge_module.TOLERANCES, "bf16", 1e-6)
    monkeypatch.setattr(merge_module, "_rounding", lambda *_: 1e-6)
    with pytest.raises(AdapterError, match=r"not written: merging in bf16 .* Merge in fp32"):
        merge_adapter(find_saved_model(classifier), tmp_path / "merged", "bf16")
    monkeypatch.setattr(save_load, "merge", lambda model: model)  # a merge that forgets the adapter
    with pytest.raises(AdapterError, match="not written: merging in fp32"):
        merge_adapter(find_saved_model(classifier), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_drift_that_rounding_the_base_explains_is_a_warning(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(merge_module.TOLERANCES, "bf16", 1e-6)
    monkeypatch.setattr(merge_module, "ROUNDING_FACTOR", 100)  # of a trained base; the adapter here is far larger
    record = merge_adapter(find_saved_model(classifier), tmp_path / "merged", "bf16")
    assert 1e-6 < record.drift["relative"] <= merge_module.ROUNDING_FACTOR * record.drift["rounding"]
    assert "rounding the base alone moves one by" in caplog.text


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path / "adapter", "gpt2", std=1e7)
    with pytest.raises(AdapterError, match=r"merging in fp16 .* beyond the range of fp16"):
        merge_adapter(find_saved_model(folder), tmp_path / "merged", "fp16")
    assert [place.name for place in tmp_path.iterdir()] == ["adapter"]


def test_a_merged_model_is_not_merged_again_nor_over_anything(classifier: Path, tmp_path: Path) -> None:
    merge_adapter(find_saved_model(classifier), tmp_path / "merged")
    with pytest.raises(AdapterError, match="a full model; there is no adapter to merge"):
        merge_adapter(find_saved_model(tmp_path / "merged"), tmp_path / "again")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merge_adapter(find_saved_model(classifier), tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"holds no merge\.json"):
        merge_adapter(find_saved_model(classifier), classifier, overwrite=True)
    merge_adapter(find_saved_model(classifier), tmp_path / "merged", "bf16", overwrite=True)
    assert MergeRecord.load(tmp_path / "merged" / MERGE_FILE).dtype == "bf16"
    (tmp_path / "merged" / MERGE_FILE).write_text(json.dumps({"task": "sst2"}))
    with pytest.raises(DataError, match="not a record of a merge: expected the keys"):
        find_saved_model(tmp_path / "merged")


def test_what_was_trained_on_a_packed_base_is_merged_into_its_unpacked_weights(tmp_path: Path) -> None:
    packed = ModelConfig(name="tiny-roberta", precision="fp32", quantised="int8")
    model = load_base(packed, get_task("rule-sentiment")).eval()
    inject(model, LoraConfig(r=4, targets=("q", "v")))
    randomize_lora_b(model)
    save_adapter(model, tmp_path / "adapter", task="rule-sentiment")
    record = merge_adapter(replace(find_saved_model(tmp_path / "adapter"), model=packed), tmp_path / "merged")
    expected, found = (
        each(token_ids()).logits.detach()
        for each in (model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"))
    )
    plain = load_adapter(load_base(replace(packed, quantised=None), get_task("rule-sentiment")), tmp_path / "adapter")
    assert float((found - expected).abs().max()) <= MERGE_FP32 * max(1.0, float(expected.abs().max()))
    assert not torch.allclose(plain.eval()(token_ids()).logits, expected, atol=10 * MERGE_FP32), "packing rounds"
    assert record.config["model"]["quantised"] is None
