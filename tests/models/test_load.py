from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification
from transformers.activations import ACT2FN

from lora_hf.core.config.schema import ModelConfig, TaskConfig
from lora_hf.core.errors import HubError, ModelError
from lora_hf.data.tasks.custom import custom_task
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora import precision
from lora_hf.models import load as load_module
from lora_hf.models.load import BUNDLED, SHAPES, load_base, load_tokenizer, set_dropout
from tests.support import small_models
from tests.support.small_models import small_config, small_model, token_ids
from tests.tolerances import PARITY_FP32

SST2 = get_task("sst2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_model("roberta", 2).save_pretrained(tmp_path)
    return tmp_path


def test_a_local_folder_loads_with_the_tasks_labels_and_a_seeded_head(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig(name=str(folder))
    mnli = get_task("mnli")
    model = load_base(config, SST2)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.problem_type == "single_label_classification"
    other = load_base(config, mnli)
    assert other.classifier.out_proj.weight.shape == (3, 32)
    assert "its own head has another shape (classifier.out_proj.bias, classifier.out_proj.weight)" in caplog.text
    (folder / "headless").mkdir()
    small_model("roberta", 2).roberta.save_pretrained(folder / "headless")
    headless = ModelConfig(name=str(folder / "headless"))
    assert load_base(headless, get_task("stsb")).config.problem_type == "regression"
    heads = [load_base(headless, mnli, seed).classifier for seed in (1, 1, 2)]
    weights = [head.out_proj.weight for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_that_lack_part_of_the_base_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["roberta.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"do not fill this model with num_labels=2: 1 missing \(roberta\.encoder\.layer\.0\.att"
    ):
        load_base(ModelConfig(name=str(folder)), SST2)


def test_a_config_that_does_not_fit_its_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    load_base(ModelConfig(name=str(folder)), SST2)
    assert "holds 16 tensors of layers that RobertaForSequenceClassification does not have" in caplog.text
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 120}))
    with pytest.raises(
        ModelError, match=r"word_embeddings\.weight: \(100, 32\) instead of \(120, 32\)\); expected the"
    ):
        load_base(ModelConfig(name=str(folder)), SST2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a pointer of git-lfs"),
        (b"", "its safetensors cannot be read"),
    ],
)
def test_weights_that_were_not_downloaded(folder: Path, content: bytes, reason: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        load_base(ModelConfig(name=str(folder)), SST2)


@pytest.mark.parametrize(
    ("place", "said"), [("", "is an adapter, not a base"), ("adapter", "is a run folder, not a base")]
)
def test_an_adapter_is_no_base(place: str, said: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "adapter_config.json").write_text("{}")
    for load in (lambda model: load_base(model, SST2), load_tokenizer):
        with pytest.raises(ModelError, match=rf"{said}.*train\.start_from={tmp_path / place}"):
            load(ModelConfig(name=str(tmp_path)))


def test_an_adapter_beside_a_base_is_not_loaded_in_its_place(folder: Path) -> None:
    """transformers would load the base that adapter_config.json names, with the adapter."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"holds an adapter beside a model\. Move adapter_config\.json out"):
        load_base(ModelConfig(name=str(folder)), SST2)


def test_names_of_another_wrapper_are_shown(folder: Path) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"of a name that it does not have \(module\."):
        load_base(ModelConfig(name=str(folder)), SST2)


def test_precision_is_that_of_the_base(folder: Path) -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert load_base(ModelConfig(name=str(folder), precision=name), SST2).dtype == dtype


@pytest.mark.parametrize("kind", ["bert", "deberta", "xlnet"])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_every_parameter_has_the_precision_that_was_asked_for(kind: str, init: Any, tmp_path: Path) -> None:
    """DeBERTa and XLNet create some in fp32, and cannot multiply them with the others."""
    small_model(kind, 2).save_pretrained(tmp_path)
    model = load_base(ModelConfig(name=str(tmp_path), precision="bf16", init=init), SST2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(input_ids=token_ids()).logits.sum().backward()


def test_auto_is_bf16_where_this_machine_is_faster_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for gain, dtype in ((2.0, torch.bfloat16), (1.1, torch.float32)):
        monkeypatch.setattr(precision, "bf16_gain", lambda gain=gain: gain)
        assert load_base(ModelConfig(name=str(folder), precision="auto"), SST2).dtype == dtype
    monkeypatch.undo()
    assert precision.bf16_gain() >= 0


@pytest.mark.full
def test_gpt2s_activation_is_one_kernel_of_the_same_formula() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2)
    fused = load_base(ModelConfig(name="gpt2", init="random", precision="fp32"), SST2).transformer.h[0].mlp.act
    x = torch.linspace(-6, 6, 1001)
    assert type(fused) is torch.nn.GELU
    assert torch.allclose(fused(x), ACT2FN[config.activation_function](x), atol=PARITY_FP32)
    assert not torch.allclose(torch.nn.functional.gelu(x), fused(x), atol=PARITY_FP32), "the other gelu would not do"


@pytest.mark.parametrize("kind", [*small_models.SHAPES, *small_models.UNKNOWN_SHAPES])
def test_one_dropout_is_set_everywhere(kind: str) -> None:
    config = small_config(kind)
    set_dropout(config, 0.25)
    model = AutoModel.from_config(config)
    own = {path: module.p for path, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert set(own.values()) <= {0.25}, own
    rates = {
        key: value
        for key, value in config.to_dict().items()
        if "drop" in key and "layer" not in key and "path" not in key and type(value) is float
    }
    assert rates.keys() or kind in ("bloom", "mpt"), "every type has a dropout"
    assert set(rates.values()) == {0.25}, rates


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "bert"])
def test_a_token_classifier_has_the_dropout_too(kind: str) -> None:
    config = small_config(kind, num_labels=3)
    set_dropout(config, 0.25)
    model = AutoModelForTokenClassification.from_config(config)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def test_a_model_in_the_cache_that_cannot_be_loaded_is_not_called_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--model/snapshots/1234"
    snapshot.mkdir(parents=True)
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(snapshot / file.name)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    load_base(ModelConfig(name="someone/model"), SST2)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"hidden_act": "no such activation"}))
    with pytest.raises(ModelError, match=r"someone/model: .*no such activation"):
        load_base(ModelConfig(name="someone/model"), SST2)


def test_a_random_base_is_drawn_from_its_seed(folder: Path) -> None:
    config = ModelConfig(name=str(folder), init="random")
    drawn = [load_base(config, SST2, seed).roberta.embeddings.word_embeddings.weight for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", SHAPES)
def test_the_published_shapes_need_no_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "roberta-base": 124_647_170,
        "roberta-large": 355_361_794,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
    }
    task = get_task("sst2" if name.startswith("roberta") else "e2e_nlg")
    with torch.device("meta"):
        model = load_base(ModelConfig(name=name, init="random"), task)
    assert sum(parameter.numel() for parameter in model.parameters()) == sizes[name]


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_bases_and_their_tokenizers_load(name: str) -> None:
    tokenizer = load_tokenizer(ModelConfig(name=name))
    assert tokenizer.pad_token is not None
    ids = tokenizer("A moving, funny and wise film.")["input_ids"]
    assert max(ids) < len(tokenizer)
    assert tokenizer.unk_token_id not in ids or tokenizer.unk_token_id == tokenizer.eos_token_id


def test_the_bundled_base_loads_for_a_task() -> None:
    model = load_base(ModelConfig(name="tiny-roberta", precision="fp32"), SST2)
    assert model.dtype == torch.float32, "kept in half precision on disk, computed in fp32"
    assert model.name_or_path == "tiny-roberta", "an adapter names its base by this, not by a path of this machine"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tiny-robert", ModelError, "tiny-robert: no such model or folder (did you mean 'tiny-roberta'?)"),
        ("./nowhere", ModelError, "./nowhere: no such folder; expected a Hugging Face model folder or a hub id"),
        (
            "roberta-base",
            HubError,
            "(HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), and the local cache does not hold this model. Set model.name",
        ),
        ("someone/something", HubError, "someone/something: the hub (https://huggingface.co) is out of reach"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, error: type, message: str) -> None:
    for load in (lambda config: load_base(config, SST2), load_tokenizer):
        with pytest.raises(error) as told:
            load(ModelConfig(name=name))
        assert message in str(told.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(ModelConfig(name=str(tmp_path)), SST2)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder holds no tokenizer; .*save_pretrained.*model\.tokenizer"):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_short_names_are_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "hub_is_reachable", lambda: True)
    asked: list[tuple[str, dict]] = []
    monkeypatch.setattr(
        load_module.AutoTokenizer,
        "from_pretrained",
        lambda place, **more: asked.append((place, more)) or _StopError.now(),
    )
    with pytest.raises(_StopError):
        load_tokenizer(ModelConfig(name="roberta-base", revision="main"))
    wanted = {"trust_remote_code": False, "revision": "main", "local_files_only": False}
    assert asked == [("FacebookAI/roberta-base", wanted)]


class _StopError(BaseException):  # no error of a base, which becomes a ModelError
    @classmethod
    def now(cls) -> None:
        raise cls


@pytest.mark.parametrize("kind", ["xlnet", "gpt_bigcode", "stablelm", "codegen"])
def test_a_language_model_that_sees_what_it_should_predict_is_refused(kind: str, tmp_path: Path) -> None:
    small_model(kind).save_pretrained(tmp_path)
    task = custom_task(TaskConfig("own", kind="generation"))
    if kind != "xlnet":
        assert load_base(ModelConfig(str(tmp_path)), task).config.model_type == kind
        return
    with pytest.raises(ModelError, match="xlnet reads the tokens after the one that it predicts"):
        load_base(ModelConfig(str(tmp_path)), task)


@pytest.mark.parametrize(
    ("kind", "task", "said"),
    [
        ("t5", "generation", "t5 is an encoder-decoder, .*kind generation or chat .*expected task.kind=seq2seq, or"),
        ("bart", "chat", "bart is an encoder-decoder, .*expected task.kind=seq2seq, or"),
        ("llama", "seq2seq", "llama is a decoder, .*kind seq2seq .*expected task.kind=generation or chat, or"),
        (
            "roberta",
            "generation",
            "roberta is an encoder, .*expected task.kind=classification or .* question_answering",
        ),
        ("roberta", "seq2seq", "roberta is an encoder, .*expected task.kind=classification or"),
        ("marian", "tokens", "marian is an encoder-decoder, .*kind tokens .*expected task.kind=seq2seq, or"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_kinds_that_it_fits(
    kind: str, task: str, said: str, tmp_path: Path
) -> None:
    small_config(kind).save_pretrained(tmp_path)
    names = ("PER", "LOC") if task == "tokens" else None
    with pytest.raises(ModelError, match=said):
        load_base(ModelConfig(str(tmp_path)), custom_task(TaskConfig("own", kind=task, label_names=names)))  # type: ignore[arg-type]
