"""Adapter files: what is written, what is read back bit for bit, and everything that must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from lora_hf.adapters.format import CONFIG_FILE, HEADER, WEIGHTS_FILE, read_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.adapters.save_load import copy_lora_weights, load_adapter, save_adapter
from lora_hf.cli.main import main
from lora_hf.core.config.schema import LoraConfig
from lora_hf.core.errors import AdapterError, ConfigError
from lora_hf.lora.inject import adapter_names, inject, inject_head, lora_layers
from lora_hf.models.load import BUNDLED_FOLDER
from tests.support.small_models import randomize_lora_b, small_model, token_ids

QUERY = "base_model.model.roberta.encoder.layer.0.attention.self.query"


def trained(kind: str = "roberta", num_labels: int | None = 3, **lora: Any) -> nn.Module:
    """A model whose adapter and head are as different from a fresh one as training makes them."""
    model = small_model(kind, num_labels)
    inject(model, LoraConfig(**{"r": 4, "targets": ("all",), **lora}))
    randomize_lora_b(model)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter)
    return model


def test_a_model_that_reads_no_tokens(tmp_path: Path) -> None:
    """Nor has it one width of hidden states."""
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16}
    AutoModel.from_config(AutoConfig.for_model("convnext", **sizes)).save_pretrained(tmp_path / "base")
    images, logits = torch.randn(2, 3, 16, 16), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
        if seed == 0:
            randomize_lora_b(inject(model, LoraConfig(r=2)))
            save_adapter(model, tmp_path / "adapter")
        else:
            load_adapter(model, tmp_path / "adapter")
        logits.append(model(images).logits)
    assert torch.equal(*logits)
    with pytest.raises(ConfigError, match="embeddings"):
        inject(model, LoraConfig(targets=("embeddings",)), "other")


def test_partitioned_tensors_are_not_saved(tmp_path: Path) -> None:
    model = trained()
    for layer in lora_layers(model).values():
        layer.adapters["default"].lora_A.data = torch.empty(0)
    with pytest.raises(AdapterError, match=r"lora_A\.weight is empty.*ZeRO-3.*GatheredParameters"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(trained(), tmp_path / "adapter", task="sst2")


@pytest.mark.parametrize("kind", ["roberta", "bert", "distilbert", "deberta-v2", "gpt2", "llama"])
@pytest.mark.parametrize("num_labels", [None, 3])
def test_saved_and_loaded_gives_bit_equal_logits(kind: str, num_labels: int | None, tmp_path: Path) -> None:
    if num_labels is None and kind in ("distilbert", "deberta-v2", "bert", "roberta"):
        pytest.skip("an encoder: no causal LM to test here")
    model, ids = trained(kind, num_labels, r=2), token_ids()
    save_adapter(model, tmp_path)
    fresh = small_model(kind, num_labels)
    for head in ("classifier", "score", "pooler", "pre_classifier"):
        for parameter in getattr(fresh, head, nn.Identity()).parameters():
            nn.init.normal_(parameter)  # another process draws another head: the file must bring it all
    assert torch.equal(load_adapter(fresh, tmp_path)(ids).logits, model(ids).logits)


def test_the_file_is_lora_and_head_and_little_else(saved: Path) -> None:
    model = trained()
    tensors = load_file(saved / WEIGHTS_FILE)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in trainable.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    payload = 4 * sum(tensor.numel() for tensor in tensors.values())
    assert sum(file.stat().st_size for file in saved.iterdir()) <= payload + 64 * 1024
    assert sorted(file.name for file in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_the_config_names_exactly_the_adapted_modules(tmp_path: Path) -> None:
    model = trained("gpt2", None, r=2, targets=("q", "v", "ffn"), lora_alpha=6)
    config = json.loads((save_adapter(model, tmp_path) / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"], config["fan_in_fan_out"]) == (
        2,
        6,
        "CAUSAL_LM",
        True,
    )
    fused = [r"transformer\.h\.0\.attn\.c_attn", r"transformer\.h\.1\.attn\.c_attn"]
    assert config["rank_pattern"] == dict.fromkeys(fused, 4), "q and v in one standard LoRA: r' = 2 r, alpha' = 2 alpha"
    assert config["alpha_pattern"] == dict.fromkeys(fused, 12)


def test_a_fused_projection_is_block_placed_in_the_file(tmp_path: Path) -> None:
    model = trained("gpt2", None, r=2, targets=("q", "v"))
    weights = lora_layers(model)["transformer.h.0.attn.c_attn"].adapters["default"]
    tensors = load_file(save_adapter(model, tmp_path) / WEIGHTS_FILE)
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert b.shape == (96, 4)
    assert torch.equal(b[:32, :2], weights.lora_B[:32])
    assert torch.equal(b[64:, 2:], weights.lora_B[32:])
    assert not b[32:64].any()
    assert not b[:32, 2:].any()


def test_labels_and_problem_type_travel_with_the_adapter(tmp_path: Path) -> None:
    model = small_model("roberta", 3, problem_type="single_label_classification")
    model.config.id2label = {0: "entailment", 1: "neutral", 2: "contradiction"}
    save_adapter(inject(model, LoraConfig()), tmp_path)
    fresh = load_adapter(small_model("roberta", 3), tmp_path)
    assert fresh.config.id2label == model.config.id2label
    assert fresh.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}
    assert fresh.config.problem_type == "single_label_classification"
    other = small_model("roberta", 3)
    other.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(AdapterError, match="labels entailment, neutral, contradiction; this model has a, b, c"):
        load_adapter(other, tmp_path)


def test_a_head_without_lora_travels_too(tmp_path: Path) -> None:
    model, ids = inject_head(small_model("roberta", 3)), token_ids()
    nn.init.normal_(model.classifier.modules_to_save["default"].out_proj.weight)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(small_model("roberta", 3), tmp_path)(ids).logits, model(ids).logits)


def test_an_adapter_trained_in_fp32_meets_its_base_in_another_precision(saved: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        load_adapter(small_model("roberta", 3).to(dtype), saved)
    with pytest.raises(AdapterError, match="was trained on another base"):
        load_adapter(small_model("roberta", 3, seed=5).to(torch.bfloat16), saved)


def test_saving_over_an_adapter_replaces_it_whole(saved: Path) -> None:
    model = small_model("roberta", 3)
    save_adapter(inject(model, LoraConfig(r=2, targets=("q",))), saved)
    assert torch.equal(load_adapter(small_model("roberta", 3), saved)(token_ids()).logits, model(token_ids()).logits)


# What must be refused. Each entry damages a good adapter and says what the message must hold.


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], keep_header: bool = True) -> None:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata=header if keep_header else None)


def reconfigure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | values))


def reheader(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        header = dict(file.metadata())
    metadata = json.loads(header[HEADER])
    change(metadata)
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, metadata=header | {HEADER: json.dumps(metadata)})


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[:-100])


A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
HEAD = "base_model.model.classifier.out_proj.weight"
HOSTILE = r"((?P<x>[a-z]|\w|\.)*)*(?P=x)[A-Z]"  # exponential in the length of a path
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(A)), f"missing: {A} (4, 32)"),
    "missing head": (lambda f: rewrite(f, lambda t: t.pop(HEAD)), f"missing: {HEAD} (3, 32)"),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update(stray=torch.ones(2))), "extra: stray (2,)"),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({B: torch.ones(31, 4)})),
        f"wrong shape: {B}: expected (32, 4), found (31, 4)",
    ),
    "not a number": (lambda f: rewrite(f, lambda t: t[B].fill_(float("nan"))), f"{B} holds NaN or infinity"),
    "truncated file": (truncate, "damaged adapter"),
    "empty file": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), "damaged adapter"),
    "pickle named safetensors": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\x80\x04K\x01." * 20), "damaged adapter"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), f"expected {WEIGHTS_FILE}, found {CONFIG_FILE}"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), f"expected {CONFIG_FILE}, found {WEIGHTS_FILE}"),
    "config is no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), "damaged adapter"),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "expected peft_type LORA, found []"),
    "another method": (lambda f: reconfigure(f, peft_type="PREFIX_TUNING"), "expected peft_type LORA, found 'PREFIX"),
    "an unsupported variant": (lambda f: reconfigure(f, use_qalora=True), "use_qalora=True not supported"),
    "an unsupported start": (lambda f: reconfigure(f, init_lora_weights="corda"), "a base that PEFT changed"),
    "a variant it does not hold": (lambda f: reconfigure(f, use_dora=True), "missing: base_model.model.roberta"),
    "another rank": (lambda f: reconfigure(f, r=8), "expected (8, 32), found (4, 32)"),
    "a rank of text": (lambda f: reconfigure(f, r="4"), "r: expected a whole number >= 1, found '4'"),
    "a rank of zero": (lambda f: reconfigure(f, r=0), "r: expected a whole number >= 1, found 0"),
    "no targets": (lambda f: reconfigure(f, target_modules="nothing"), "matches no projection of this model"),
    "targets that are no expression": (lambda f: reconfigure(f, target_modules="("), "not a regular expression"),
    "targets that would match for years": (lambda f: reconfigure(f, target_modules=HOSTILE), "takes too long"),
    "ranks that would match for years": (lambda f: reconfigure(f, rank_pattern={HOSTILE: 4}), "takes too long"),
    "targets of another kind": (lambda f: reconfigure(f, target_modules=3), "expected an expression or a list"),
    "another base": (lambda f: reheader(f, lambda a: a["fingerprint"].update(sha256="0" * 64)), "another base"),
    "another number of labels": (
        lambda f: reheader(f, lambda a: a.update(num_labels=2, labels=["no", "yes"])),
        "was trained for num_labels=2 (no, yes); this model has num_labels=3",
    ),
    "a header of nonsense": (lambda f: reheader(f, lambda a: a.update(slices={"x": [["a", 2]]})), "damaged adapter"),
    "slices beyond the layer": (
        lambda f: reheader(f, lambda a: a["slices"].update({QUERY.removeprefix("base_model.model."): [[0, 99]]})),
        "found the slices [(0, 99)] and rank 4",
    ),
}


def full_if_slow(damage: str) -> Any:
    """The ranks of a hostile file go through the same limited search as its targets, and take as long."""
    return pytest.param(damage, marks=pytest.mark.full if damage.endswith("would match for years") else ())


@pytest.mark.parametrize("damage", [full_if_slow(name) for name in DAMAGE])
def test_a_damaged_adapter_is_refused_and_the_model_left_alone(damage: str, saved: Path) -> None:
    break_it, message = DAMAGE[damage]
    break_it(saved)
    model = small_model("roberta", 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        load_adapter(model, saved)
    assert message in str(error.value)
    assert str(saved) in str(error.value)
    after = model.state_dict()
    assert not adapter_names(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_that_changes_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_adapter(inject(small_model("roberta", 3), LoraConfig(r=2)), tmp_path)  # B starts at zero
    load_adapter(small_model("roberta", 3), tmp_path)
    assert "lora_B is zero in every module" in caplog.text


def test_one_changed_weight_makes_another_base(saved: Path) -> None:
    model = small_model("roberta", 3)
    with torch.no_grad():
        model.roberta.encoder.layer[1].output.dense.weight[3, 3] += 1e-3
    with pytest.raises(AdapterError, match="was trained on another base: expected weights"):
        load_adapter(model, saved)


def test_an_adapter_for_a_larger_or_another_model_is_refused(saved: Path) -> None:
    for model in (small_model("roberta", 3, num_hidden_layers=1), small_model("bert", 3), small_model("gpt2")):
        with pytest.raises(AdapterError):
            load_adapter(model, saved)


def test_entries_outside_the_slices_are_refused(tmp_path: Path) -> None:
    save_adapter(trained("gpt2", None, r=2, targets=("q", "v")), tmp_path)
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    rewrite(tmp_path, lambda tensors: tensors[key][40].fill_(1.0))
    with pytest.raises(AdapterError, match=r"c_attn.lora_B is not zero outside its slices"):
        load_adapter(small_model("gpt2"), tmp_path)


def test_a_missing_folder_and_an_unknown_adapter_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"not an adapter folder: .*, found no such folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="no adapter 'other' on this model; it has: default"):
        save_adapter(trained(), tmp_path, name="other")
    assert not list(tmp_path.iterdir())
    save_adapter(trained(), tmp_path / "mine")  # as PEFT saves one that is not called default
    with pytest.raises(AdapterError, match=rf"did you mean '{tmp_path}/mine'\?"):
        read_adapter(tmp_path)


def test_the_adapter_that_is_likely_meant_is_named(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = shutil.copytree(saved, Path("outputs") / "sst2" / "adapter")
    for place in ("outputs/sst2", "outputs/sts2/adapter", "outputs/sts2", "./outputs/sst2/adaptr"):
        with pytest.raises(AdapterError, match=r"not an adapter folder: .* \(did you mean 'outputs/sst2/adapter'\?\)"):
            read_adapter(place)
    with pytest.raises(AdapterError, match=r"found no such folder$"):
        read_adapter("outputs/something else/adapter")
    with pytest.raises(AdapterError, match=r"found a file \(did you mean 'outputs/sst2/adapter'\?\)$"):
        find_saved_model(adapter / WEIGHTS_FILE)
    Path("outputs/notes.md").touch()  # of the form of a hub id
    with pytest.raises(AdapterError, match=r"expected adapter_config.json, found a file$"):
        find_saved_model("outputs/notes.md")


def test_an_adapter_without_its_task_says_how_to_save_one(tmp_path: Path) -> None:
    saved = save_adapter(trained(), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: does not say which .*task=\"sst2\""):
        find_saved_model(saved)


def test_equal_adapters_give_equal_files(tmp_path: Path) -> None:
    """safetensors alone draws the order of its metadata."""
    model = inject(small_model("roberta", 2), LoraConfig(r=2))
    for number in range(6):
        save_adapter(model, tmp_path / str(number), task="rule-sentiment")
    files = {(tmp_path / str(number) / WEIGHTS_FILE).read_bytes() for number in range(6)}
    assert len(files) == 1
    assert list(load_file(tmp_path / "0" / WEIGHTS_FILE)) == list(read_adapter(tmp_path / "0").tensors)


def test_an_adapter_of_a_model_without_label_names_gets_those_of_its_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the README: `from_pretrained(num_labels=2)`, then `save_adapter(task=...)`."""
    base = BUNDLED_FOLDER / "tiny-roberta"
    model = inject(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), LoraConfig(r=2))
    save_adapter(model, tmp_path / "adapter", task="rule-sentiment")
    assert main(["predict", "--adapter", str(tmp_path / "adapter"), "--text", "A warm film."]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("negative", "positive")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_weights_of_another_scaling_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, use_rslora: bool
) -> None:
    settings = {"r": 3, "targets": ("q", "v"), "use_rslora": use_rslora}
    save_adapter(inject(small_model("gpt2"), LoraConfig(lora_alpha=6, **settings)), tmp_path)
    for alpha in (6, 12):
        caplog.clear()
        copy_lora_weights(inject(small_model("gpt2"), LoraConfig(lora_alpha=alpha, **settings)), read_adapter(tmp_path))
        assert ("lora_alpha=6, and this adapter has 12" in caplog.text) == (alpha == 12)
        assert ("is 2 times as large" in caplog.text) == (alpha == 12)
