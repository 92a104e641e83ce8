"""Runs in this process: what a run folder holds, and what stops a run that would not train."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.records import RunRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor, evaluate
from lora_hf.lora.inject import lora_layers, merge
from lora_hf.lora.layers import LoraLinear
from lora_hf.training import run as training
from lora_hf.training import validation
from lora_hf.training.run import Run, train
from lora_hf.training.run_dir import LOCK_FILE
from lora_hf.training.trainer import AdapterTrainer
from tests.tolerances import ACCUMULATION_FP32, PARITY_FP32

pytestmark = pytest.mark.minutes

ROWS = 96


@pytest.fixture
def few_rows() -> dict[str, Any]:
    """A short training set, so that a run takes seconds; the whole development set."""
    task = get_task("rule-sentiment")
    rows = task.load(None, task.splits)
    return {"train": rows["train"].select(range(ROWS)), "validation": rows["validation"].select(range(100))}


def config(folder: Path, name: str = "run", lora: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    sections = load_config("rule_sentiment.yaml", ["model.precision=fp32"]).to_dict()
    sections["lora"] |= lora or {}
    sections["train"] |= {"epochs": 2, "batch_size": 16, **train}
    sections["output"] |= {"dir": str(folder), "plots": False, "name": name}
    return RunConfig.from_dict(sections)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return read_adapter(run.weights).tensors


def test_the_run_folder_holds_what_a_run_is(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    wanted = config(tmp_path, seed=3)
    wanted = replace(wanted, output=replace(wanted.output, plots=True))
    run = train(wanted, rows=few_rows)
    names = {"config.yaml", "adapter", "record.json", "predictions-validation.jsonl", "log.jsonl", "curves.png"}
    names |= {"confusion-validation.png", "reliability-validation.png"}
    assert {path.name for path in run.folder.iterdir()} == names | {"checkpoints", LOCK_FILE}
    assert RunConfig.from_dict(yaml.safe_load((run.folder / "config.yaml").read_text())) == wanted
    record = RunRecord.load(run.folder / "record.json")
    assert record == run.record
    shutil.copytree(run.weights, tmp_path / "copied")
    here, elsewhere = find_saved_model(run.weights), find_saved_model(tmp_path / "copied")
    assert elsewhere == replace(here, folder=elsewhere.folder), (
        "a copy has the length, tokenizer and decoding of its run"
    )
    assert record.rows == {"train": ROWS, "validation": 100}
    assert record.parameters["trainable"] == record.parameters["lora"] + record.parameters["head"]
    assert record.files["adapter"] == sum(file.stat().st_size for file in run.weights.iterdir())
    assert {site["role"] for site in record.sites} == {"q", "k", "v", "o", "ffn_up", "ffn_down"}
    epochs = [entry["epoch"] for entry in record.history if "eval_validation_accuracy" in entry]
    assert epochs == [1.0, 2.0], "the development metric after each epoch"
    assert record.memory["rss"] > 0
    assert record.timings["train"] > 0
    assert 0 < record.timings["cpu"] <= record.timings["total"] * (os.cpu_count() or 1)
    assert not [text for text in json.dumps(record.__dict__).split('"') if text.startswith(str(Path.home()))]
    lines = [json.loads(line) for line in (run.folder / "predictions-validation.jsonl").read_text().splitlines()]
    right = np.mean([line["prediction"] == line["label"] for line in lines])
    assert len(lines) == 100
    assert right == pytest.approx(record.metrics["validation"]["accuracy"])
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_checkpoints_hold_the_adapter_alone_and_the_best_is_the_one_in_memory(
    tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[AdapterTrainer] = []
    monkeypatch.setattr(training, "install_callbacks", lambda trainer, *rest: kept.append(trainer))
    scores = iter([0.9, 0.1, 0.2])
    task = get_task("rule-sentiment")
    # The first epoch is made the best by decree, so that the best and the last differ for certain.
    monkeypatch.setattr(type(task), "score", lambda *_: {"accuracy": next(scores, 0.9)})
    run = train(config(tmp_path, epochs=3, hf={"save_total_limit": 3}), rows=few_rows)
    best = Path(kept[0].state.best_model_checkpoint)
    assert best.name == "checkpoint-6"
    assert run.record.best == {"metric": "eval_validation_accuracy", "value": 0.9, "step": 6}
    for folder in (run.folder / "checkpoints").iterdir():
        assert not list(folder.glob("model*.safetensors")), "the base must not be saved"
    in_memory, on_disk = weights(run), read_adapter(best).tensors
    assert all(torch.equal(in_memory[key], on_disk[key]) for key in on_disk)
    last = read_adapter(run.folder / "checkpoints" / "checkpoint-18").tensors
    assert any(not torch.equal(in_memory[key], last[key]) for key in last)


@pytest.mark.full
@pytest.mark.parametrize("best", [1, 2])
def test_the_evaluation_of_the_best_weights_is_not_made_again(
    best: int, tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations: list[str] = []
    loop = AdapterTrainer.evaluation_loop

    def counted(trainer: AdapterTrainer, *rest: Any, **named: Any) -> Any:
        evaluations.append(named["metric_key_prefix"])
        return loop(trainer, *rest, **named)

    monkeypatch.setattr(AdapterTrainer, "evaluation_loop", counted)
    task = get_task("rule-sentiment")
    scores = iter([0.1 * (best == 1), 0.1 * (best == 2)])
    monkeypatch.setattr(type(task), "score", lambda *_: {"accuracy": next(scores, 0.9)})
    run = train(config(tmp_path, epochs=2, lr=1e-2), rows=few_rows)
    assert run.record.best["step"] == best * 6
    assert evaluations == ["eval_validation"] * 2
    lines = (run.folder / "predictions-validation.jsonl").read_text(encoding="utf-8").splitlines()
    logits = Predictor.load(find_saved_model(run.weights)).logits(few_rows["validation"][:])
    written = np.array([json.loads(line)["logits"] for line in lines])
    assert np.abs(written - logits).max() < PARITY_FP32
    monkeypatch.setattr(type(task), "score", lambda *_: {"accuracy": 0.0})
    train(config(tmp_path, "none", epochs=1, hf={"eval_strategy": "no", "save_strategy": "no"}), rows=few_rows)
    assert evaluations[2:] == ["validation"], "without an evaluation in training"


@pytest.mark.full
def test_the_saved_adapter_scores_what_the_record_says(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    run = train(config(tmp_path), rows=few_rows)
    predictor = Predictor.load(find_saved_model(run.weights))
    scores, _ = evaluate(predictor, {"validation": few_rows["validation"]})["validation"]
    assert scores == run.record.metrics["validation"]


@pytest.mark.full
@pytest.mark.parametrize(("method", "precision"), [("head", "fp32"), ("full", "fp32"), ("full", "bf16")])
def test_the_other_methods_take_the_same_way(
    method: str, precision: str, tmp_path: Path, few_rows: dict[str, Any]
) -> None:
    sections = config(tmp_path, method=method, epochs=1, lr=1e-4).to_dict()
    sections["model"]["precision"] = precision
    run = train(RunConfig.from_dict(sections), rows=few_rows)
    counts = run.record.parameters
    assert counts["lora"] == 0
    assert counts["trainable"] == (counts["head"] if method == "head" else counts["total"])
    predictor = Predictor.load(find_saved_model(run.weights))
    scores, _ = evaluate(predictor, {"validation": few_rows["validation"]})["validation"]
    # Scored in fp32: a run whose every product was rounded to bf16 may differ in a row or two of a hundred.
    apart = 0.02 if precision == "bf16" else 0
    assert scores["accuracy"] == pytest.approx(run.record.metrics["validation"]["accuracy"], abs=apart)


@pytest.mark.full
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"lora": {"init_lora_weights": "pissa_niter_4", "r": 4}, "loraplus_lr_ratio": 4},
        {"lora": {"use_dora": True, "use_rslora": True, "layers": [-1], "bias": "all"}},
    ],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    variant: dict[str, Any], tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(tmp_path / "whole", **variant), rows=few_rows)

    def die(self: AdapterTrainer, *_: Any) -> None:
        self.control.should_training_stop = True
        raise KeyboardInterrupt

    evaluations = AdapterTrainer.evaluate
    monkeypatch.setattr(
        AdapterTrainer,
        "evaluate",
        lambda self, *rest, **named: die(self) if self.state.epoch > 1.5 else evaluations(self, *rest, **named),
    )
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "cut", **variant), rows=few_rows)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "run" / "record.json").exists()
    resumed = train(config(tmp_path / "cut", **variant), resume="auto", rows=few_rows)
    assert resumed.folder == tmp_path / "cut" / "run"
    uninterrupted, continued = weights(whole), weights(resumed)
    assert all(torch.equal(uninterrupted[key], continued[key]) for key in uninterrupted)
    assert resumed.record.metrics == whole.record.metrics
    predictor = Predictor.load(find_saved_model(whole.weights))
    scores, _ = evaluate(predictor, {"validation": few_rows["validation"]})["validation"]
    assert scores == whole.record.metrics["validation"], "and is loaded as it was trained"


@pytest.mark.full
def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    first, second, other = (
        weights(train(config(tmp_path, name, epochs=1, seed=seed), rows=few_rows))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.full
def test_eight_rows_at_once_equal_four_times_two(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    # Adam divides by a gradient's own size: rounding in a gradient near zero would decide a whole step. SGD does not.
    sgd = {"optim": "sgd"}
    at_once = train(config(tmp_path, "a", epochs=1, batch_size=8, lr=0.1, hf=sgd), rows=few_rows)
    in_parts = train(
        config(tmp_path, "b", epochs=1, batch_size=2, gradient_accumulation=4, lr=0.1, hf=sgd), rows=few_rows
    )
    a, b = weights(at_once), weights(in_parts)
    for key in a:
        assert torch.allclose(a[key], b[key], atol=ACCUMULATION_FP32, rtol=0), key
    assert in_parts.record.best["step"] == at_once.record.best["step"] == ROWS // 8


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_activations_computed_again_give_the_same_run(
    tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = 0
    plain = LoraLinear.forward

    def counted(self: LoraLinear, *rest: Any) -> torch.Tensor:
        nonlocal forwards
        forwards += self.training
        return plain(self, *rest)

    monkeypatch.setattr(LoraLinear, "forward", counted)
    runs, counts = [], []
    for hf in ({}, {"gradient_checkpointing": True}):
        forwards = 0
        sgd = {"optim": "sgd", **hf}
        runs.append(weights(train(config(tmp_path, f"{hf}", epochs=1, max_steps=4, lr=0.1, hf=sgd), rows=few_rows)))
        counts.append(forwards)
    assert counts[1] == 2 * counts[0] > 0
    for key in runs[0]:
        assert torch.allclose(runs[0][key], runs[1][key], atol=ACCUMULATION_FP32, rtol=0), key


@pytest.mark.full
def test_a_run_can_start_from_the_lora_weights_of_another(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    first = train(config(tmp_path, "first", epochs=1), rows=few_rows)
    # A learning rate too small to move anything shows what the second run began with.
    second = train(config(tmp_path, "second", epochs=1, lr=1e-12, start_from=str(first.weights)), rows=few_rows)
    a, b = weights(first), weights(second)
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-8, rtol=0) == (".lora_" in key), f"{key}: LoRA yes, head no"


@pytest.mark.full
def test_patience_stops_a_run_that_no_longer_improves(
    tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.6, 0.6, 0.6])
    monkeypatch.setattr(type(get_task("rule-sentiment")), "score", lambda *_: {"accuracy": next(scores, 0.7)})
    run = train(config(tmp_path, epochs=9, patience=2), rows=few_rows)
    assert max(entry["epoch"] for entry in run.record.history) == 4.0
    assert run.record.best["value"] == 0.6


def test_an_adapter_that_no_gradient_reaches_stops_the_run(
    tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected = training.inject_at
    # A merged adapter is out of the forward pass: its B stays zero for ever, while the head learns and all looks well.
    monkeypatch.setattr(training, "inject_at", lambda *rest: merge(injected(*rest)))
    with pytest.raises(TrainingError, match=r"every lora_B is unchanged after step 2: no gradient reaches the adapter"):
        train(config(tmp_path), rows=few_rows)


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = training.load_base

    def broken(*rest: Any) -> Any:
        model = loaded(*rest)
        model.roberta.embeddings.LayerNorm.weight.data.fill_(1e30)
        return model

    monkeypatch.setattr(training, "load_base", broken)
    with pytest.raises(
        TrainingError,
        match=r"the loss is nan at step 1: lower train\.lr, or use model\.precision=fp32.*checkpoint: none",
    ):
        train(config(tmp_path, hf={"logging_steps": 100}), rows=few_rows)


@pytest.mark.full
@pytest.mark.parametrize("more", [{"gradient_accumulation": 2}, {"hf": {"train_sampling_strategy": "group_by_length"}}])
def test_a_loss_that_is_no_number_names_its_batch_and_the_last_good_checkpoint(
    more: dict[str, Any], tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, prepared = AdapterTrainer.compute_loss, AdapterTrainer._prepare_inputs
    batches: list[list[int]] = []

    def broken(self: AdapterTrainer, model: Any, inputs: Any, **named: Any) -> torch.Tensor:
        loss = computed(self, model, inputs, **named)
        if not model.training or len(batches) < 10:
            return loss
        return loss * float("inf")

    def seen(self: AdapterTrainer, inputs: Any) -> Any:
        if self.model.training:
            batches.append(
                [
                    row[mask.bool()].tolist()
                    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
                ]
            )
        return prepared(self, inputs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", broken)
    monkeypatch.setattr(AdapterTrainer, "_prepare_inputs", seen)
    with pytest.raises(TrainingError, match=r"the loss is inf at step") as stop:
        train(config(tmp_path, epochs=3, **more), rows=few_rows)
    accumulated = more.get("gradient_accumulation", 1)
    epoch = 6 // accumulated
    assert f"at step {9 // accumulated + 1}:" in str(stop.value)
    assert str(stop.value).endswith(f"last good checkpoint: {tmp_path / 'run' / 'checkpoints' / f'checkpoint-{epoch}'}")
    named = [int(word) for word in str(stop.value).split("examples ")[1].split(" (")[0].split(", ")]
    tokenizer = training.load_tokenizer(config(tmp_path).model)
    assert [tokenizer(few_rows["train"][row]["sentence"])["input_ids"] for row in named] == batches[9]


def test_a_finished_run_is_not_written_over(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    run = train(config(tmp_path, epochs=1), rows=few_rows)
    before = (run.folder / "record.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"holds a finished run; choose another output\.name, or set output\.overwrite"
    ):
        train(config(tmp_path, epochs=1), rows=few_rows)
    assert (run.folder / "record.json").read_bytes() == before


def test_bad_places_are_told_before_anything_is_trained(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output\.dir: cannot create .*file.run"):
        train(config(tmp_path / "file"), rows=few_rows)
    with pytest.raises(ConfigError, match=r"resume=.*: expected a checkpoint folder"):
        train(config(tmp_path), resume=str(tmp_path / "nowhere"), rows=few_rows)
    with pytest.raises(ConfigError, match=r"train\.hf: .*sometimes"):
        train(config(tmp_path, hf={"logging_strategy": "sometimes"}), rows=few_rows)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing may be left behind"


@pytest.mark.full
def test_trackers_and_other_fields_of_training_arguments_are_reached(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    hf = {"report_to": "tensorboard", "train_sampling_strategy": "group_by_length", "logging_steps": 1}
    run = train(config(tmp_path, epochs=1, hf=hf), rows=few_rows)
    assert list((run.folder / "checkpoints").glob("runs/*/events.out.tfevents.*"))
    # Grouping by length must not touch the order of the rows that are scored.
    lines = [json.loads(line) for line in (run.folder / "predictions-validation.jsonl").read_text().splitlines()]
    at_once = [row.argmax() for row in Predictor.load(find_saved_model(run.weights)).logits(few_rows["validation"][:])]
    assert [line["prediction"] for line in lines] == at_once
    assert run.record.metrics["validation"]["accuracy"] == run.record.best["value"]
    assert [entry["step"] for entry in run.record.history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


WANDB = """
import types
run, logged, settings = None, [], {}
def init(**values):
    global run
    settings.update(values)
    run = types.SimpleNamespace(summary={}, _label=lambda **_: None)
class _Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)
config, log = _Config(), logged.append
"""
TRACKIO = """
import types
logged, settings = [], {}
class _Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)
config, log, finish = _Config(), logged.append, lambda: None
def init(**values):
    settings.update(values)
context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
"""


@pytest.mark.parametrize(
    ("tracker", "source"), [("wandb", WANDB), pytest.param("trackio", TRACKIO, marks=pytest.mark.full)]
)
def test_a_tracker_gets_the_curves_and_the_name_of_the_run(
    tracker: str, source: str, tmp_path: Path, few_rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in with the names that transformers uses; a real one would need an account or a server."""
    package = tmp_path / "packages" / tracker
    (package / "sdk" / "lib").mkdir(parents=True)
    for folder in (package / "sdk", package / "sdk" / "lib"):
        (folder / "__init__.py").touch()
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): ...")
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in [name for name in sys.modules if name.partition(".")[0] == tracker]:
        monkeypatch.delitem(sys.modules, name)
    run = train(config(tmp_path, epochs=1, hf={"report_to": tracker, "logging_steps": 1}), rows=few_rows)
    module = sys.modules.pop(tracker)
    assert module.settings["name"] == run.folder.name
    logged = {key for entry in module.logged for key in entry}
    assert {"train/loss", "train/learning_rate", "eval/validation_accuracy"} <= logged


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(validation, "find_spec", lambda name: None if name == tracker else found(name))
    with pytest.raises(ConfigError, match=rf"^train\.hf: report_to: {tracker} .*pip install .*\[{tracker}\]'$"):
        train(config(tmp_path, hf={"report_to": [tracker]}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_a_base_in_bf16_trains_an_adapter_in_fp32(tmp_path: Path, few_rows: dict[str, Any]) -> None:
    sections = config(tmp_path, epochs=1).to_dict()
    sections["model"]["precision"] = "bf16"
    run = train(RunConfig.from_dict(sections), rows=few_rows)
    tensors = weights(run)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(bool(tensor.any()) for key, tensor in tensors.items() if "lora_B" in key)
    predictor = Predictor.load(find_saved_model(run.weights), precision="bf16")
    assert next(iter(lora_layers(predictor.model).values())).weight.dtype == torch.bfloat16
