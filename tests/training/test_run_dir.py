"""Who may begin or resume in a run folder, and what is never deleted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from lora_hf.adapters.format import WEIGHTS_FILE
from lora_hf.cli.main import main
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE
from lora_hf.training.checkpoints import checkpoints_in, translate_disk_full
from lora_hf.training.run import Run, train
from lora_hf.training.run_dir import LOCK_FILE, begin_run, find_run_folder, run_lock, run_state
from tests.support.kills import kill_once, small_config, small_rows

HOLD = """
import sys
from pathlib import Path
from lora_hf.core.config.schema import RunConfig
from lora_hf.training.run_dir import begin_run, run_lock
folder = Path(sys.argv[1])
with run_lock(folder) as lock:
    begin_run(RunConfig(), folder, None, lock)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return small_rows()


@pytest.fixture
def finished(rows: dict[str, Any], tmp_path: Path) -> Run:
    """A run with the checkpoints 2, 4 and 6."""
    return train(changed(small_config(tmp_path, max_steps=6), save_total_limit=5), rows=rows)


def changed(config: RunConfig, overwrite: bool = False, **hf: Any) -> RunConfig:
    """The config with other `train.hf`, or with `output.overwrite`."""
    settings = replace(config.train, hf={**config.train.hf, **hf})
    return replace(config, train=settings, output=replace(config.output, overwrite=overwrite))


def config_of(run: Run, overwrite: bool = False, **train: Any) -> RunConfig:
    config = RunConfig.from_dict(run.record.config)
    return changed(replace(config, train=replace(config.train, **train)), overwrite)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != LOCK_FILE}


def test_a_checkpoint_resumes_with_its_config_alone(finished: Run, rows: dict[str, Any]) -> None:
    checkpoint = str(finished.folder / "checkpoints" / "checkpoint-6")
    before = content(finished.folder)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 8 there and 2 here; train\.lr is 0\.001 there and 5"):
        train(config_of(finished, overwrite=True, lr=5.0, batch_size=2), checkpoint, rows)
    with pytest.raises(ConfigError, match=r"train\.schedule is 'linear' there"):
        train(config_of(finished, overwrite=True, schedule="constant"), checkpoint, rows)
    assert content(finished.folder) == before


@pytest.mark.full
def test_what_concerns_no_step_may_change(
    finished: Run, rows: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = finished.folder / "checkpoints" / "checkpoint-6"
    caplog.set_level("INFO", "lora_hf")
    again = train(config_of(finished, overwrite=True, eval_batch_size=5), str(checkpoint), rows)
    assert "train.eval_batch_size is 64 there and 5 here" in caplog.text
    assert again.record.metrics == finished.record.metrics


def test_other_rows_or_tokens_are_another_run(finished: Run, rows: dict[str, Any]) -> None:
    """Also behind the same config: the rows were edited, or the tokenizer's files were."""
    checkpoint, before = str(finished.folder / "checkpoints" / "checkpoint-2"), content(finished.folder)
    flipped = rows["train"].map(lambda row: {"label": 1 - row["label"]})
    for changed_rows, said in (
        ({**rows, "train": flipped}, "the rows of train, or how the tokenizer"),
        ({split: part.select(range(len(part) - 1)) for split, part in rows.items()}, "of train and validation"),
    ):
        with pytest.raises(ConfigError, match=f"checkpoint-2: .*{said}.*Restore the data"):
            train(config_of(finished, overwrite=True), checkpoint, changed_rows)
    assert content(finished.folder) == before


@pytest.mark.full
def test_a_finished_run_and_newer_checkpoints_stay(finished: Run, rows: dict[str, Any]) -> None:
    checkpoint = finished.folder / "checkpoints" / "checkpoint-2"
    before = content(finished.folder)
    with pytest.raises(ConfigError, match=r"record\.json, checkpoint-6, checkpoint-4 .*output\.overwrite=true"):
        train(config_of(finished), str(checkpoint), rows)
    record = finished.folder / RECORD_FILE
    saved = record.read_bytes()
    record.unlink()
    with pytest.raises(ConfigError, match=r"checkpoint-6, checkpoint-4 .*or use resume=auto for the newest"):
        train(config_of(finished), str(checkpoint), rows)
    record.write_bytes(saved)
    assert content(finished.folder) == before
    again = train(config_of(finished, overwrite=True), str(checkpoint), rows)
    assert again.record.metrics == finished.record.metrics


def test_a_run_that_chose_its_thresholds_before_it_died_resumes(finished: Run) -> None:
    config = finished.folder / RUN_CONFIG_FILE
    config.write_text(config.read_text().replace("thresholds: null", "thresholds: [0.3, 0.6]"))
    (finished.folder / RECORD_FILE).unlink()
    folder, checkpoint = find_run_folder(config_of(finished), "auto")
    assert (folder, checkpoint) == (finished.folder, finished.folder / "checkpoints" / "checkpoint-6")


def test_a_new_run_keeps_no_results_of_the_weights_before(tmp_path: Path) -> None:
    results = ("record.json", "scores-test.json", "outputs-test.jsonl", "predictions-test.txt", "confusion-test.png")
    for name in (*results, "notes.md"):
        (tmp_path / name).write_text("{}")
    with run_lock(tmp_path) as lock:
        begin_run(RunConfig(), tmp_path, None, lock)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != LOCK_FILE) == ["config.yaml", "notes.md"]


def test_resume_auto_deletes_nothing(finished: Run, rows: dict[str, Any]) -> None:
    before = content(finished.folder)
    with pytest.raises(ConfigError, match=r"finished run; .*leave out resume=auto"):
        train(config_of(finished, overwrite=True), "auto", rows)
    record = finished.folder / RECORD_FILE
    saved = record.read_bytes()
    record.unlink()
    with pytest.raises(ConfigError, match=r"another config: train\.lr .*leave out resume=auto"):
        train(config_of(finished, overwrite=True, lr=5.0), "auto", rows)
    folder, checkpoint = find_run_folder(config_of(finished, overwrite=True), "auto")
    assert (folder, checkpoint) == (finished.folder, finished.folder / "checkpoints" / "checkpoint-6")
    record.write_bytes(saved)
    assert content(finished.folder) == before


def test_two_runs_without_a_name_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.from_dict({"output": {"dir": str(tmp_path)}})
    assert find_run_folder(config, None) != find_run_folder(config, None)
    long = RunConfig.from_dict({"model": {"name": "m" * 1000}, "output": {"dir": str(tmp_path)}})
    find_run_folder(long, None)[0].mkdir()


@pytest.mark.full
def test_a_second_run_of_a_name_is_refused(rows: dict[str, Any], tmp_path: Path) -> None:
    refused: list[str] = []

    class Second(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != 3:
                return
            newest = str(checkpoints_in(tmp_path / "run" / "checkpoints")[0])
            for resume in (None, "auto", newest):
                for overwrite in (False, True):
                    with pytest.raises(ConfigError, match="another run is training here") as error:
                        train(changed(config, overwrite), resume, rows)
                    refused.append(str(error.value))

    config = small_config(tmp_path, max_steps=4)
    run = train(config, rows=rows, callbacks=[Second()])
    assert len(refused) == 6
    assert run.record.best["step"]
    train(changed(config, overwrite=True), rows=rows)  # the first one has released it


def test_a_killed_process_releases_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run is training here"):
            find_run_folder(small_config(tmp_path), None)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        find_run_folder(small_config(tmp_path), None)


def test_what_another_run_wrote_while_this_one_loaded_stays(finished: Run) -> None:
    before = run_state(finished.folder)
    (finished.folder / "checkpoints" / "checkpoint-8").mkdir()
    with run_lock(finished.folder) as lock, pytest.raises(ConfigError, match="start this one again"):
        begin_run(config_of(finished), finished.folder, None, lock, before)
    assert (finished.folder / RECORD_FILE).exists()


def test_pictures_of_an_earlier_run_go_and_others_stay(tmp_path: Path) -> None:
    for name in ("curves.png", "confusion-test.png", "reliability-validation.png", "mine.png"):
        (tmp_path / name).touch()
    with run_lock(tmp_path) as lock:
        begin_run(RunConfig(), tmp_path, None, lock)
    assert [path.name for path in tmp_path.glob("*.png")] == ["mine.png"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("output.name=" + "n" * 1000, "output.name: expected a name of at most 200 bytes"),
        ("output.name=" + "ü" * 101, "of 202"),
        ("output.dir=a/" + "n" * 1000, "output.dir: expected a name of at most 200 bytes"),
        ("output.dir=" + "n/" * 3000, "output.dir: expected a shorter path"),
    ],
)
def test_names_that_no_file_system_takes(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("rule_sentiment.yaml", [word])


@pytest.mark.parametrize("word", ["task.data_dir", "model.name", "train.start_from", "output.dir"])
def test_a_long_path_is_one_message(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["task.name=mine", "task.kind=regression", f"output.dir={tmp_path}", f"{word}=/{'n' * 1000}"]
    code = main(["train", "--config", "rule_sentiment.yaml", *words])
    assert code == 2
    assert "nnn" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["..", ".", "../x", "-x", "n" * 101])
def test_a_task_name_is_no_path(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"task.name={name}", "task.kind=regression", f"task.data_dir={tmp_path}", f"output.dir={tmp_path}"]
    assert main(["train", "--config", "rule_sentiment.yaml", *words]) == 2
    assert "task.name: expected at most 100 letters" in capsys.readouterr().err


@pytest.mark.full
def test_no_duration_follows_a_clock_that_is_set_back(
    rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(calls))
    record = train(small_config(tmp_path, max_steps=4), rows=rows).record
    durations = [value for entry in record.history for key, value in entry.items() if key.endswith("_runtime")]
    rates = [value for entry in record.history for key, value in entry.items() if key.endswith("_per_second")]
    assert len(durations) == 3
    assert min(*durations, *rates, *record.timings.values(), *record.throughput.values()) >= 0


def test_a_full_disk_names_our_file() -> None:
    folder = Path("run")
    for error in (
        OSError(28, "No space left on device", "run/log.jsonl"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ):
        with pytest.raises(TrainingError) as told, translate_disk_full(folder):
            raise error
        assert str(told.value).startswith("run")
        assert "inline_container" not in str(told.value)


@pytest.mark.full
def test_the_log_of_a_killed_run_is_read_within_limits(rows: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert kill_once(config, die_in=("checkpoint-4", True))["killed"]
    assert (tmp_path / "run" / LOCK_FILE).exists() == (os.name == "posix")
    run = train(config, "auto", rows)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 17))


@pytest.mark.full
@pytest.mark.parametrize("named", [False, True])
def test_a_finished_run_goes_on_from_its_end(
    named: bool, rows: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a constant learning rate, to what a run of that length gives."""
    short = small_config(tmp_path / "short", max_steps=4, schedule="constant", warmup_steps=0)
    run = train(short, rows=rows)
    longer = replace(short, train=replace(short.train, max_steps=8))
    resumed = train(longer, str(run.folder / "checkpoints" / "checkpoint-4") if named else "auto", rows)
    whole = train(replace(longer, output=replace(longer.output, dir=str(tmp_path / "long"))), rows=rows)
    assert "train.max_steps is 8 instead of 4: training goes on after checkpoint-4" in caplog.text
    assert resumed.folder == run.folder
    assert losses(resumed) == losses(whole)
    assert (resumed.weights / WEIGHTS_FILE).read_bytes() == (whole.weights / WEIGHTS_FILE).read_bytes()
    assert resumed.record.config["train"]["max_steps"] == 8
    with pytest.raises(ConfigError, match=r"train\.max_steps is 8 there and 2 here"):
        train(short_of(longer, 2), str(run.folder / "checkpoints" / "checkpoint-4"), rows)
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(short_of(longer, 2), "auto", rows)


def short_of(config: RunConfig, steps: int) -> RunConfig:
    return replace(config, train=replace(config.train, max_steps=steps))


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.record.history if "loss" in entry]


@pytest.mark.full
def test_a_longer_schedule_is_named_and_followed(
    rows: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = small_config(tmp_path, epochs=1, schedule="linear", warmup_ratio=0.1, hf={"logging_steps": 1})
    run = train(short, rows=rows)
    last = run.record.history[-1]["step"]
    resumed = train(replace(short, train=replace(short.train, epochs=2)), "auto", rows)
    assert "schedule=linear now ends with the longer run" in caplog.text
    rates = {entry["step"]: entry["learning_rate"] for entry in resumed.record.history if "learning_rate" in entry}
    assert min(rates) == 1, "the log goes on"
    assert rates[last + 1] == pytest.approx(short.train.lr * last / (2 * last - math.ceil(0.2 * last)), rel=0.05)
    assert max(rates) == 2 * last
