"""Which modules are fully trained: the head, what the checkpoint lacks, and what the user names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from lora_hf.adapters.combine import combine_adapters
from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError, ModelError
from lora_hf.lora.heads import head_paths, modules_to_train, new_parameters, task_type
from lora_hf.lora.inject import adapter_heads, inject, lora_layers, merge
from lora_hf.models.load import quantise
from tests.support.small_models import randomize_lora_b, small_config, small_model, token_ids
from tests.tolerances import FILE_ROUNDTRIP


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A checkpoint of a bare BERT without a pooler."""
    torch.manual_seed(0)
    AutoModel.from_config(small_config("bert"), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def classifier(folder: Path, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_a_new_pooler_is_trained_and_saved_like_the_head(bert: Path, tmp_path: Path) -> None:
    model = classifier(bert)
    assert modules_to_train(model) == ["bert.pooler", "classifier"]
    inject(model, LoraConfig(r=2))
    randomize_lora_b(model)
    assert all(p.requires_grad for p in model.bert.pooler.modules_to_save.parameters())
    logits = model(token_ids()).logits
    save_adapter(model, tmp_path / "adapter")
    other = load_adapter(classifier(bert, seed=1), tmp_path / "adapter")
    assert torch.allclose(other(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, tmp_path / "adapter/adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"missing: base_model.model.bert.pooler.dense.weight"):
        load_adapter(classifier(bert, seed=1), tmp_path / "adapter")


def test_a_pretrained_pooler_and_a_language_models_head_stay_frozen(tmp_path: Path) -> None:
    small_model("bert", 2).save_pretrained(tmp_path / "whole")
    assert modules_to_train(classifier(tmp_path / "whole")) == ["classifier"]
    small_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "llama")
    assert modules_to_train(AutoModelForCausalLM.from_pretrained(tmp_path / "llama")) == []
    small_model("llama").model.save_pretrained(tmp_path / "bare")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "bare", tie_word_embeddings=False)
    assert modules_to_train(new) == ["lm_head"], "the checkpoint holds no head"


def test_a_new_masked_language_model_trains_what_is_random_of_its_head(bert: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(bert)
    assert modules_to_train(model) == ["cls.predictions.transform"], "the rest is tied, or zero in every process"


def test_without_a_checkpoint_the_head_is_new(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert new_parameters(small_model("electra", 2)) is None
    assert modules_to_train(small_model("electra", 2)) == ["classifier"]
    copied = copy.deepcopy(classifier(bert))
    (bert / "model.safetensors").unlink()
    assert new_parameters(copied) is None, "a copy has lost what from_pretrained reported"
    inject(copied, LoraConfig(r=2))
    assert "classifier is trained as a new head, and the rest is treated as pretrained" in caplog.text


def test_the_checkpoint_tells_what_is_new_in_a_copy(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = classifier(bert)
    state = torch.get_rng_state()
    copied = copy.deepcopy(known)
    assert new_parameters(copied) == new_parameters(known) == new_parameters(copy.deepcopy(known))
    assert modules_to_train(copied) == ["bert.pooler", "classifier"]
    assert "it lacks: bert.pooler.dense, classifier" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shards", [False, True])
def test_a_copied_language_model_trains_its_head_only_if_the_checkpoint_lacks_it(tmp_path: Path, shards: bool) -> None:
    size = {"max_shard_size": "20KB"} if shards else {}
    model = small_model("qwen3", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "whole", **size)
    model.model.save_pretrained(tmp_path / "bare", **size)
    assert (tmp_path / "bare/model.safetensors.index.json").exists() is shards
    for name, expected in (("whole", []), ("bare", ["lm_head"])):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, tie_word_embeddings=False)
        assert modules_to_train(copy.deepcopy(loaded)) == modules_to_train(loaded) == expected
        built = AutoModelForCausalLM.from_config(loaded.config)
        assert modules_to_train(built) == expected


def test_a_checkpoint_in_the_hubs_cache_tells_it_too(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy.deepcopy(classifier(bert))
    copied.name_or_path = "someone/bert"
    snapshot = tmp_path / "hub/models--someone--bert/snapshots/1234"
    snapshot.parent.mkdir(parents=True)
    bert.rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert modules_to_train(copied) == ["bert.pooler", "classifier"]


def test_a_model_with_more_layers_than_its_checkpoint_is_not_the_one_in_it(bert: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(bert, num_hidden_layers=3)
    model = AutoModelForSequenceClassification.from_config(config)
    assert model.name_or_path == str(bert)
    assert new_parameters(model) is None


def test_a_layer_that_the_checkpoint_lacks_is_refused(bert: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"does not hold bert.encoder.layer.1.output.dense.weight.*initialized them randomly"
    ):
        inject(classifier(bert), LoraConfig(r=2))


def test_a_resized_vocabulary_is_named_trained_and_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    small_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")

    def larger(seed: int) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(103)
        return model

    model = inject(larger(1), LoraConfig(r=2))
    assert "resized from 100 to 103 tokens" in caplog.text
    assert list(adapter_heads(model)) == ["model.embed_tokens", "lm_head"]
    ids = torch.tensor([[7, 100, 102, 8]])
    logits = model(ids).logits
    save_adapter(model, tmp_path / "adapter")
    assert torch.allclose(
        load_adapter(larger(2), tmp_path / "adapter")(ids).logits, logits, atol=FILE_ROUNDTRIP, rtol=0
    )


def test_a_parameter_of_the_head_that_no_module_holds_is_refused_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights of wav2vec2's sum over its layers, which transformers leaves uninitialized if it loads a base."""
    sizes: dict[str, Any] = {"conv_dim": (32,), "conv_kernel": (4,), "conv_stride": (2,), "num_conv_pos_embeddings": 4}
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Wav2Vec2Config(**sizes, **encoder, num_conv_pos_embedding_groups=2, classifier_proj_size=16)
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    classifier, lora = transformers.Wav2Vec2ForSequenceClassification, LoraConfig(r=2, targets=("q_proj",))
    inject(classifier.from_pretrained(tmp_path), lora)
    assert "layer_weights" not in caplog.text
    with pytest.raises(ModelError, match=r"does not hold layer_weights.*use_weighted_layer_sum=False"):
        inject(classifier.from_pretrained(tmp_path, use_weighted_layer_sum=True), lora)
    caplog.clear()
    config.use_weighted_layer_sum = True
    classifier(config).save_pretrained(tmp_path / "whole")
    inject(classifier.from_pretrained(tmp_path / "whole"), lora)
    assert "layer_weights" not in caplog.text
    model = inject(classifier(config), lora)
    assert "layer_weights: not in the checkpoint, and no module" in caplog.text
    assert list(adapter_heads(model)) == ["projector", "classifier"]


@pytest.mark.parametrize(
    ("kind", "tied", "saved"),
    [
        ("llama", False, ["model.embed_tokens", "lm_head"]),
        ("llama", True, ["model.embed_tokens", "lm_head"]),
        ("bert", True, ["bert.embeddings.word_embeddings"]),
    ],
)
def test_a_vocabulary_resized_after_inject_is_saved_with_a_warning_and_loads(
    kind: str, tied: bool, saved: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_model(kind, 3 if kind == "bert" else None, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def load() -> PreTrainedModel:
        auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
        return auto.from_pretrained(tmp_path / "base").eval()

    model = inject(load(), LoraConfig(r=2))
    randomize_lora_b(model)
    save_adapter(model, tmp_path / "before")
    assert not caplog.text
    model.resize_token_embeddings(103)
    ids = torch.tensor([[7, 100, 102, 8]])
    logits = model(ids).logits
    save_adapter(model, tmp_path / "adapter")
    assert "resized from 100 to 103 tokens after an adapter was added" in caplog.text
    assert "call resize_token_embeddings before inject" in caplog.text
    file = read_adapter(tmp_path / "adapter")
    assert set(saved) <= set(file.config["modules_to_save"])
    larger = load()
    larger.resize_token_embeddings(103)
    assert torch.allclose(load_adapter(larger, tmp_path / "adapter")(ids).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    with pytest.raises(
        AdapterError, match=r"holds a vocabulary of 103 tokens, and the base has 100.*resize_token_embeddings\(103\)"
    ):
        load_adapter(load(), tmp_path / "adapter")


def test_modules_to_save_are_trained_besides_the_head_and_merged(tmp_path: Path) -> None:
    small_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = inject(base, LoraConfig(r=2, modules_to_save=("lm_head", "model.norm")))
    assert list(adapter_heads(model)) == ["model.norm", "lm_head"]
    torch.nn.init.normal_(model.model.norm.modules_to_save["default"].weight)
    logits = model(token_ids()).logits
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter")
    assert torch.equal(again(token_ids()).logits, logits)
    assert torch.allclose(merge(again)(token_ids()).logits, logits, atol=FILE_ROUNDTRIP, rtol=0)
    with pytest.raises(ConfigError, match=r"no module of this llama is named 'lm_heat' \(did you mean 'lm_head'"):
        modules_to_train(model, ("lm_heat",))


def test_modules_to_save_that_cannot_be_trained_are_refused() -> None:
    model = quantise(small_model("roberta", 3), "int8")
    with pytest.raises(ConfigError, match=r"modules_to_save: .*intermediate.dense has a weight packed in int8"):
        inject(model, LoraConfig(r=2, targets=("q",), modules_to_save=("intermediate.dense",)))
    with pytest.raises(ConfigError, match=r"modules_to_save: .*dropout has no parameters"):
        inject(model, LoraConfig(r=2, targets=("q",), modules_to_save=("embeddings.dropout",)))
    assert not lora_layers(model)


def test_an_adapter_without_another_ones_modules_to_save_runs_the_bases_own() -> None:
    model = inject(small_model("llama"), LoraConfig(r=2, targets=("q",), modules_to_save=("norm",)), "whole")
    plain = inject(small_model("llama"), LoraConfig(r=2, targets=("q",)), "plain")
    torch.nn.init.zeros_(model.model.norm.modules_to_save["whole"].weight)
    inject(model, LoraConfig(r=2, targets=("q",)), "plain")
    assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)
    assert not any("norm" in name for name, each in model.named_parameters() if each.requires_grad)
    combine_adapters(model, {"plain": 1.0}, "mix")
    assert "mix" not in model.model.norm.modules_to_save


def test_a_module_is_adapted_or_trained_whole_but_not_both() -> None:
    model = inject(small_model("llama"), LoraConfig(r=2, targets=("embeddings",)))
    with pytest.raises(AdapterError, match=r"model.embed_tokens: another adapter has A and B in this module"):
        inject(model, LoraConfig(r=2, modules_to_save=("embed_tokens",)), name="other")
    model = inject(small_model("llama"), LoraConfig(r=2, modules_to_save=("embed_tokens",)))
    with pytest.raises(AdapterError, match=r"model.embed_tokens: another adapter trains this module fully"):
        inject(model, LoraConfig(r=2, targets=("model.embed_tokens",)), name="other")


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_module_within_a_base_in_half_precision_gives_its_precision(precision: torch.dtype) -> None:
    model = small_model("llama").to(precision)
    inject(model, LoraConfig(r=2, modules_to_save=("embed_tokens", "norm")))
    assert model.model.norm.modules_to_save["default"].weight.dtype == torch.float32
    assert model.model(token_ids()).last_hidden_state.dtype == precision


@pytest.mark.parametrize(
    ("kind", "auto", "expected"),
    [
        ("t5", "AutoModelForQuestionAnswering", ("QUESTION_ANS", ["qa_outputs"])),
        ("xlnet", "AutoModelForSequenceClassification", ("SEQ_CLS", ["sequence_summary", "logits_proj"])),
        ("deberta-v2", "AutoModelForMultipleChoice", (None, ["pooler", "classifier"])),
        ("bart", "AutoModelForSeq2SeqLM", ("SEQ_2_SEQ_LM", [])),
        ("mpnet", "AutoModel", ("FEATURE_EXTRACTION", [])),
        ("gpt2", "AutoModelForTokenClassification", ("TOKEN_CLS", ["classifier"])),
    ],
)
def test_the_head_and_pefts_task_type(kind: str, auto: str, expected: tuple[str | None, list[str]]) -> None:
    model = getattr(transformers, auto).from_config(small_config(kind))
    assert (task_type(model), head_paths(model)) == expected
