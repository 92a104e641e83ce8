"""Sweeps in this process, of real runs: what they leave, what they free, and what they do about bad trials."""

from __future__ import annotations

import gc
import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import OutputConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.records import RunRecord, SweepRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.sweep import storage, trials
from lora_hf.experiments.sweep.space import read_sweep
from lora_hf.experiments.sweep.study import SweepSettings, sweep
from lora_hf.training.run import train
from lora_hf.training.run_dir import LOCK_FILE
from tests.tolerances import FLAT_RSS

BEST_HAS = {"adapter", "predictions-validation.jsonl", "confusion-validation.png", "reliability-validation.png"}

pytestmark = pytest.mark.full

QUICK = ("train.batch_size=8", "task.max_length=24", "model.precision=fp32")
SECOND_STEPS = "train.hf={eval_strategy: steps, eval_steps: 2, save_strategy: steps, save_steps: 2}"
SPACE = ("lora.r=4..16:log2", "train.lr=1e-4..2e-2:log", "lora.targets=[q, v]|all", "lora.lora_alpha=2*lora.r")


def steps(words: tuple[str, ...]) -> list[str]:
    return [] if any(word.startswith("train.max_steps=") for word in words) else ["train.max_steps=10"]


@pytest.fixture(scope="module")
def rows() -> dict[str, Dataset]:
    task = get_task("rule-sentiment")
    return {split: part.select(range(64)) for split, part in task.load(None, task.splits).items()}


def run(
    output: Path, rows: dict[str, Dataset], *words: str, trials: int | None = 3, **more: Any
) -> tuple[Path, SweepRecord]:
    config, space = read_sweep("rule_sentiment.yaml", [*QUICK, *steps(words), *words])
    drawn = more.pop("plots", False)
    config = replace(config, output=OutputConfig(dir=str(output), plots=drawn))
    more.setdefault("pruner", "none")  # so that few trials are complete
    storage = more.pop("storage", None)
    settings = SweepSettings(config, space, more.pop("name", "s"), trials, **more)
    # A picture takes half a second to write.
    with nullcontext() if drawn else patch.object(Figure, "savefig", lambda *_, **__: None):
        return sweep(settings, storage, rows)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Dataset]) -> tuple[Path, SweepRecord]:
    return run(tmp_path_factory.mktemp("outputs"), rows, *SPACE, trials=3, plots=True)


def test_the_record_and_the_runs_agree(swept: tuple[Path, SweepRecord]) -> None:
    folder, record = swept
    assert SweepRecord.load(folder / "trials.json") == record
    assert [trial["number"] for trial in record.trials] == [0, 1, 2]
    for trial in record.trials:
        of_run = RunRecord.load(folder / trial["record"])
        assert of_run.metrics["validation"]["accuracy"] == trial["score"]
        assert of_run.config["lora"]["r"] == trial["values"]["lora.r"] == trial["values"]["lora.lora_alpha"] / 2
        assert of_run.config["train"]["lr"] == trial["values"]["train.lr"]
    scores = [trial["score"] for trial in record.trials]
    assert record.best == record.trials[scores.index(max(scores))]
    assert sum(record.importance.values()) == pytest.approx(1)
    assert set(record.importance) == {"lora.r", "train.lr", "lora.targets"}
    assert record.versions["optuna"] != "not installed"


def test_only_the_best_trial_keeps_its_adapter(swept: tuple[Path, SweepRecord]) -> None:
    folder, record = swept
    for trial in record.trials:
        kept = {place.name for place in (folder / f"trial-{trial['number']}").iterdir()}
        light = {"record.json", "config.yaml", "log.jsonl", "curves.png"}
        is_best = trial["number"] == record.best["number"]
        assert (folder / "best").samefile(folder / f"trial-{trial['number']}") == is_best
        assert kept - {LOCK_FILE} == (light | BEST_HAS if is_best else light)
    for name in ("importance.png", "parallel.png", "history.png", "learning-rate.png", "losses.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".results-*"))


def test_the_best_config_trains_to_the_same_score(
    swept: tuple[Path, SweepRecord], rows: dict[str, Dataset], tmp_path: Path
) -> None:
    folder, record = swept
    text = (folder / "best.yaml").read_text()
    assert f"# python scripts/train.py --config {folder / 'best.yaml'}\n" in text
    assert "output:" not in text
    again = train(load_config(folder / "best.yaml", [f"output.dir={tmp_path}", "output.plots=false"]), rows=rows).record
    best = RunRecord.load(folder / record.best["record"])
    assert again.metrics == best.metrics
    losses = [[entry["loss"] for entry in each.history if "loss" in entry] for each in (again, best)]
    assert losses[0] == losses[1]


def test_a_study_goes_on_and_repeats_itself(
    swept: tuple[Path, SweepRecord], rows: dict[str, Dataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, record = swept
    run(tmp_path, rows, *SPACE, trials=1)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lora_hf"):
        _, gone_on = run(tmp_path, rows, *SPACE, trials=3)
    assert caplog.messages[0].endswith(": 3 trials, 1 of them already finished")
    assert [line.split(":")[0] for line in caplog.messages if line.startswith("trial ")] == ["trial 1", "trial 2"]
    for ours, theirs in zip(gone_on.trials, record.trials, strict=True):
        assert ours | {"seconds": 0, "cpu_seconds": 0} == theirs | {"seconds": 0, "cpu_seconds": 0}
    _, same = run(tmp_path, rows, *SPACE, trials=2)
    assert same.trials == gone_on.trials, "there are enough already"
    with pytest.raises(ConfigError, match="another config, space or seed"):
        run(tmp_path, rows, *SPACE, trials=4, seed=1)
    with pytest.raises(ConfigError, match="of a study that is not in the storage"):
        run(tmp_path, rows, *SPACE, storage=f"sqlite:///{tmp_path}/other.db")


def test_memory_is_flat_and_no_model_outlives_its_trial(
    tmp_path: Path, rows: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # the type of a thing, not its class: that of a lazy module would import it
    before = sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects())
    alive, resident = [], []

    def look() -> None:
        free()
        alive.append(sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects()) - before)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    free = trials.free_memory
    monkeypatch.setattr(trials, "free_memory", look)
    run(tmp_path, rows, "lora.r=4..64:log2", "train.seed=0..9", "train.max_steps=2", trials=6)
    assert alive == [0] * 6
    assert resident[-1] - resident[2] < FLAT_RSS, resident


def test_trials_below_the_median_are_pruned_on_the_way(
    tmp_path: Path, rows: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "STARTUP", 1)
    with caplog.at_level(logging.INFO, logger="lora_hf"):
        folder, record = run(tmp_path, rows, SECOND_STEPS, "train.lr=1e-5..3e-3:log", trials=4, pruner="median")
    complete = [trial for trial in record.trials if trial["state"] == "complete"]
    pruned = [trial for trial in record.trials if trial["state"] == "pruned"]
    assert pruned
    assert len(complete) + len(pruned) == 4
    assert all(len(trial["evaluations"]) == 5 for trial in complete)
    for trial in pruned:
        at = len(trial["evaluations"])
        assert at < 5
        others = sorted(t["evaluations"][at - 1] for t in complete if t["number"] < trial["number"])
        assert max(trial["evaluations"]) <= others[len(others) // 2]
        assert not (folder / f"trial-{trial['number']}" / "checkpoints").exists()
        assert any(
            f"trial {trial['number']}: " in line and f"pruned at step {2 * at}" in line for line in caplog.messages
        )


def test_successive_halving_stops_all_but_the_better_half(tmp_path: Path, rows: dict[str, Dataset]) -> None:
    _, record = run(tmp_path, rows, SECOND_STEPS, "train.lr=1e-6..3e-3:log", trials=6, pruner="halving")
    assert record.pruner == "halving"
    pruned = [trial for trial in record.trials if trial["state"] == "pruned"]
    assert 0 < len(pruned) < 6
    for trial in record.trials:
        for rung in (1, 2, 4)[: len(trial["evaluations"])]:
            reached = [each for each in record.trials if len(each["evaluations"]) >= rung]
            seen = sorted(each["evaluations"][rung - 1] for each in reached if each["number"] <= trial["number"])
            best = seen[-max(1, len(seen) // 2)]
            stopped = trial["state"] == "pruned" and len(trial["evaluations"]) == rung
            assert stopped == (trial["evaluations"][rung - 1] < best), (trial, rung)
    for trial in pruned:
        assert trial["steps"] == 2 * len(trial["evaluations"])
        assert trial["score"] is None
        assert trial["cpu_seconds"] > 0


def test_a_grid_trains_every_combination(tmp_path: Path, rows: dict[str, Dataset]) -> None:
    space = ("lora.r=4,8", "train.lr=1e-3,1e-2", "train.max_steps=2")
    _, record = run(tmp_path, rows, *space, trials=None, sampler="grid")
    tried = [(trial["values"]["lora.r"], trial["values"]["train.lr"]) for trial in record.trials]
    assert tried == [(4, 1e-3), (4, 1e-2), (8, 1e-3), (8, 1e-2)]
    assert {trial["state"] for trial in record.trials} == {"complete"}


def test_an_unknown_pruner_is_refused(tmp_path: Path, rows: dict[str, Dataset]) -> None:
    with pytest.raises(
        ConfigError, match=r"pruner: expected one of halving, .*found 'halvin' \(did you mean 'halving'"
    ):
        run(tmp_path, rows, "train.lr=1e-6..3e-3:log", pruner="halvin")


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, rows: dict[str, Dataset], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lora_hf"):
        _, record = run(tmp_path, rows, "train.lr=1e-3,1e36", "train.max_steps=4", trials=3, pruner="halving")
    failed = [trial for trial in record.trials if trial["state"] != "complete"]
    assert 0 < len(failed) < 3
    assert {trial["state"] for trial in failed} <= {"diverged", "failed"}
    for trial in failed:
        assert trial["values"]["train.lr"] == 1e36
        assert "not" in trial["error"] or "nan" in trial["error"]
        assert any(f"trial {trial['number']}: train.lr=1e+36: {trial['state']}: " in line for line in caplog.messages)
    assert record.best["values"]["train.lr"] == 1e-3
    assert any("so none can be pruned" in line for line in caplog.messages)


def test_values_that_exclude_each_other_fail_one_trial(
    tmp_path: Path, rows: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(trial: optuna.Trial, *_: Any) -> float:
        trial.set_user_attr(storage.PRECISION, "fp32")
        return 0.5

    monkeypatch.setattr(trials, "run_trial", scored)
    words = ("model.quantised=null|int8", "train.method=lora,full")
    _, record = run(tmp_path, rows, *words, trials=None, sampler="grid")
    assert [trial["state"] for trial in record.trials] == ["complete", "complete", "complete", "failed"]
    assert "train.method=full cannot train quantized weights" in record.trials[-1]["error"]


def test_the_best_config_names_the_weights_that_are_there(
    tmp_path: Path, rows: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(trial: optuna.Trial, *_: Any) -> float:
        trial.set_user_attr(storage.PRECISION, "fp32")
        return float(trial.params["train.method"] == "full")

    monkeypatch.setattr(trials, "run_trial", scored)
    folder, _ = run(tmp_path / "my runs", rows, "train.method=lora,full", trials=None, sampler="grid")
    header = (folder / "best.yaml").read_text(encoding="utf-8").splitlines()[:3]
    assert header[1:] == [
        f"# Its model: {folder / 'trial-1' / 'model'}",
        f"# python scripts/train.py --config '{folder / 'best.yaml'}'",
    ]


def test_all_failed_is_an_error_that_says_why(tmp_path: Path, rows: dict[str, Dataset]) -> None:
    with pytest.raises(TrainingError, match="all 2 trials failed; the first error: ") as caught:
        run(tmp_path, rows, "train.lr=1e36..1e37", "train.max_steps=4", trials=2)
    trials = json.loads((tmp_path / "s" / "trials.json").read_text())["trials"]
    assert str(caught.value).endswith(trials[0]["error"])
    assert not (tmp_path / "s" / "best.yaml").exists()


def test_what_is_wrong_with_every_trial_stops_the_sweep(tmp_path: Path, rows: dict[str, Dataset]) -> None:
    with pytest.raises(ConfigError, match=r"train\.group_by_prompt: rule-sentiment has no prompts"):
        run(tmp_path, rows, "train.group_by_prompt=true", "train.lr=1e-3..1e-2")


def test_a_trial_that_others_gave_up_does_not_end_the_sweep(
    tmp_path: Path, rows: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, real, given_up = f"sqlite:///{tmp_path}/x.db", trials.run_trial, []

    def slow(trial: Any, *rest: Any) -> float:
        value = real(trial, *rest)
        if not given_up:  # what another process does after a minute without a heartbeat
            given_up.append(trial.number)
            other = storage.open_storage(storage.parse_url(url))
            other.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
        return value

    monkeypatch.setattr(trials, "run_trial", slow)
    _, record = run(tmp_path, rows, "train.lr=1e-4..1e-2", "train.max_steps=1", trials=1, storage=url)
    assert any("another process marked it as interrupted" in line for line in caplog.messages)
    assert [(trial["number"], trial["state"]) for trial in record.trials] == [(0, "interrupted"), (1, "complete")]


def test_another_mistake_of_a_value_is_still_a_bug(
    tmp_path: Path, rows: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*rest: Any) -> float:
        raise ValueError("a bug")

    monkeypatch.setattr(trials, "run_trial", broken)
    with pytest.raises(ValueError, match="a bug"):
        run(tmp_path, rows, "train.lr=1e-4..1e-2", trials=1)
