"""Runs that are killed, told to stop, or out of space: each ends, once gone on with, as the one that never was."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, Interrupted, TrainingError
from lora_hf.data.tasks.registry import get_task
from lora_hf.training import checkpoints
from lora_hf.training.run import Run, train
from tests.support.kills import differences, kill_once, small_config, small_rows
from tests.support.waiting import LIMIT, wait_until

pytestmark = pytest.mark.minutes

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return small_rows()


@pytest.fixture(scope="module")
def whole(rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that was never stopped."""
    return train(small_config(tmp_path_factory.mktemp("whole")), rows=rows)


def newest(folder: Path) -> Path:
    return checkpoints.checkpoints_in(folder / "checkpoints")[0]


@pytest.mark.full
def test_the_same_seed_gives_the_same_run_to_the_last_bit(whole: Run, rows: dict[str, Any], tmp_path: Path) -> None:
    again = train(small_config(tmp_path), rows=rows)
    assert not differences(whole, again.folder)
    other = train(small_config(tmp_path / "other", seed=1), rows=rows)
    found = differences(whole, other.folder)
    assert {"adapter/adapter_model.safetensors", "checkpoints/checkpoint-16/optimizer.pt", "history"} <= set(found)


@pytest.mark.full
@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_random_ends_as_the_whole_one(
    number: int, whole: Run, rows: dict[str, Any], tmp_path: Path
) -> None:
    step = random.Random(number).randrange(1, 9)  # of 16

    def logged(folder: Path) -> bool:
        log = folder / "log.jsonl"
        return log.exists() and f'"step": {step},' in log.read_text(encoding="utf-8")

    attempts = (small_config(tmp_path / f"{attempt}") for attempt in count())  # a run may be faster than the kill
    config = next(config for config in attempts if kill_once(config, logged)["killed"])
    assert not differences(whole, train(config, "auto", rows).folder)


@pytest.mark.full
@pytest.mark.parametrize("complete", [False, True])
def test_a_run_killed_while_a_checkpoint_is_written_ends_as_the_whole_one(
    complete: bool, whole: Run, rows: dict[str, Any], tmp_path: Path
) -> None:
    """Killed with all files written but the manifest, or with the manifest just in its place."""
    config = small_config(tmp_path)
    state = kill_once(config, die_in=("checkpoint-8", complete))
    assert state["killed"]
    assert state["checkpoint"] == ("checkpoint-8" if complete else "checkpoint-6")
    assert state["while_writing"] == (not complete)
    assert not differences(whole, train(config, "auto", rows).folder)


def stop_at(step: int, kind: signal.Signals) -> Any:
    class Stopper(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1:
                signal.raise_signal(kind)

    return Stopper()


@pytest.mark.full
@pytest.mark.parametrize(
    ("step", "more"),
    [
        (11, {"hf": {"train_sampling_strategy": "group_by_length"}}),
        (8, {"hf": {}}),  # the end of an epoch: its evaluation comes before the checkpoint
        (10, {"max_steps": 10, "hf": {}}),
        (11, {"gradient_accumulation": 2, "batch_size": 4, "patience": 5, "hf": {}}),
    ],
)
def test_a_signal_saves_first_and_the_run_goes_on(
    step: int, more: dict[str, Any], rows: dict[str, Any], tmp_path: Path
) -> None:
    kind = signal.SIGINT
    before = signal.getsignal(kind)
    with pytest.raises(Interrupted, match=rf"{kind.name}: resume after step {step} with") as stop:
        train(small_config(tmp_path, **more), rows=rows, callbacks=[stop_at(step, kind)])
    assert stop.value.code == 130
    assert signal.getsignal(kind) is before
    folder = tmp_path / "run"
    assert newest(folder).name == f"checkpoint-{step}"
    assert not (folder / "record.json").exists()
    resumed = train(small_config(tmp_path, **more), resume="auto", rows=rows)
    assert not differences(train(small_config(tmp_path / "whole", **more), rows=rows), resumed.folder)


@pytest.mark.full
def test_generation_rows_grouped_by_prompt_go_on_inside_an_epoch(tmp_path: Path) -> None:
    config = small_config(tmp_path, group_by_prompt=True, epochs=2, hf={}, batch_size=8)
    sections = config.to_dict()
    sections["task"] |= {"name": "rule-restaurants", "max_length": 256}
    sections["model"]["name"] = "tiny-gpt2"
    task = get_task("rule-restaurants")
    rows = {split: part.select(range(24)) for split, part in task.load(None, task.splits).items()}

    def config_in(folder: Path) -> Any:
        return RunConfig.from_dict(sections | {"output": {"dir": str(folder), "plots": False, "name": "run"}})

    whole = train(config_in(tmp_path / "whole"), rows=rows)
    inside = newest(whole.folder).name
    step = int(inside.removeprefix("checkpoint-")) - 2
    with pytest.raises(Interrupted):
        train(config_in(tmp_path), rows=rows, callbacks=[stop_at(step, signal.SIGINT)])
    assert not differences(whole, train(config_in(tmp_path), resume="auto", rows=rows).folder)


def test_a_second_signal_stops_at_once(rows: dict[str, Any], tmp_path: Path) -> None:
    class Twice(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"SIGTERM: resume after step 4") as stop:
        train(small_config(tmp_path), rows=rows, callbacks=[Twice()])
    assert stop.value.code == 143
    assert newest(tmp_path / "run").name == "checkpoint-4"


def test_a_thread_that_cannot_take_signals_trains(rows: dict[str, Any], tmp_path: Path) -> None:
    runs: list[Run] = []
    work = threading.Thread(target=lambda: runs.append(train(small_config(tmp_path, epochs=1), rows=rows)))
    work.start()
    work.join()
    assert runs


@pytest.mark.full
def test_the_command_ends_with_the_code_of_its_signal(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_config(tmp_path, epochs=10_000).to_dict()))
    command = [sys.executable, str(REPO / "scripts" / "train.py"), "--config", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: process.poll() is not None or (tmp_path / "run" / "log.jsonl").exists())
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 143, said
    assert re.search(r"stopped by SIGTERM: resume after step \d+ .*--resume auto", said)
    assert "Traceback" not in said


@pytest.mark.full
def test_a_damaged_newest_checkpoint_is_gone_back_from(
    whole: Run, rows: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        train(small_config(tmp_path), rows=rows, callbacks=[stop_at(9, signal.SIGINT)])
    damaged = newest(tmp_path / "run") / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"checkpoint-9 is damaged: optimizer\.pt has changed; resume=auto"):
        train(small_config(tmp_path), resume=str(damaged.parent), rows=rows)
    resumed = train(small_config(tmp_path), resume="auto", rows=rows)
    assert "checkpoint-9 is damaged: optimizer.pt has changed" in caplog.text
    assert not differences(whole, resumed.folder)


def test_an_unfinished_run_is_neither_mixed_nor_written_over(rows: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(small_config(tmp_path), rows=rows, callbacks=[stop_at(5, signal.SIGINT)])
    kept = newest(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds an unfinished run.*resume=auto"):
        train(small_config(tmp_path), rows=rows)
    for resume in (None, "auto"):
        with pytest.raises(
            ConfigError, match=r"an unfinished run of another config: train\.seed is 0 there and 1 here;"
        ):
            train(small_config(tmp_path, seed=1), resume=resume, rows=rows)
    assert not checkpoints.find_damage(kept)


@pytest.mark.full
def test_a_moved_run_finds_its_best_checkpoint(whole: Run, rows: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(small_config(tmp_path / "before"), rows=rows, callbacks=[stop_at(15, signal.SIGINT)])
    shutil.move(tmp_path / "before", tmp_path / "after")
    resumed = train(small_config(tmp_path / "after"), resume=str(newest(tmp_path / "after" / "run")), rows=rows)
    assert not differences(whole, resumed.folder)


@pytest.mark.full
def test_a_file_that_may_grow_no_further_ends_with_a_message(whole: Run, rows: dict[str, Any], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class ShortOfSpace(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(
            TrainingError, match=r"cannot be written.*Free some space, then resume after step 4"
        ) as full:
            train(small_config(tmp_path), rows=rows, callbacks=[ShortOfSpace()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(str(full.value).splitlines()) == 1
    assert newest(tmp_path / "run").name == "checkpoint-4", "no incomplete one is left"
    assert not differences(whole, train(small_config(tmp_path), resume="auto", rows=rows).folder)


def test_a_full_disk_ends_with_a_message(rows: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user may mount no small disk")
    try:
        with pytest.raises(TrainingError, match=r"cannot be written: .*Free some space"):
            train(small_config(disk, hf={**small_config(disk).train.hf, "save_total_limit": 50}), rows=rows)
        left = checkpoints.checkpoints_in(disk / "run" / "checkpoints")
        assert left
        assert not any(map(checkpoints.find_damage, left))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.full
def test_what_was_logged_after_the_checkpoint_is_logged_once(rows: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(tmp_path)
    kill_once(config, die_in=("checkpoint-6", True))
    log = tmp_path / "run" / "log.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "loss": 9}\n{"step": 8, "lo')
    train(config, "auto", rows)
    steps = [entry["step"] for line in log.read_text().splitlines() if "loss" in (entry := json.loads(line))]
    assert steps == list(range(1, 17))
