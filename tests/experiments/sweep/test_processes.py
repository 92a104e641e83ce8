"""The command in several processes at once, and after one of them was killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lora_hf.adapters.resolve import find_saved_model
from lora_hf.cli import main as cli
from lora_hf.core.config.loader import load_config
from lora_hf.core.records import SweepRecord
from lora_hf.experiments.sweep import storage, study
from tests.support.waiting import LIMIT, wait_until

pytestmark = pytest.mark.full

REPO = Path(__file__).parents[3]
WORDS = [
    "--config", "rule_sentiment.yaml", "--study", "shared", "--json",
    "lora.r=4..16:log2", "train.lr=1e-4..1e-2:log", "train.max_steps=3", "train.batch_size=8", "task.max_length=8",
    "model.precision=fp32", "output.plots=false",
]  # fmt: skip


def started(output: Path, trials: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPO / "scripts" / "sweep.py"), *WORDS, "--output", str(output), *words]
    return subprocess.Popen(
        [*command, "--trials", str(trials)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_share_the_trials_of_one_sqlite_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    processes = [started(tmp_path, 4, "--storage", url) for _ in range(2)]
    answers = [process.communicate(timeout=LIMIT) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert not any("Warning" in said or "Traceback" in said for _, said in answers), answers
    one, two = (json.loads(out) for out, _ in answers)
    assert one == two, "both end with all trials"
    assert one["trials"] == {"complete": 4}
    record = SweepRecord.load(Path(one["record"]))
    assert [trial["number"] for trial in record.trials] == [0, 1, 2, 3], "four in all, not four each"
    assert len({trial["values"]["train.lr"] for trial in record.trials}) == 4
    logged = [[line for line in said.splitlines() if line.startswith("INFO: trial ")] for _, said in answers]
    assert len(logged[0]) + len(logged[1]) == 4
    assert all(logged), "each ran some"
    load_config(one["config"])
    assert Path(one["run"]).resolve() == Path(one["record"]).with_name(f"trial-{record.best['number']}").resolve()
    assert find_saved_model(Path(one["run"], "adapter")).task.name == "rule-sentiment"


def stored_trials(url: str) -> list[Any]:
    return optuna.load_study(study_name="shared", storage=storage.open_storage(storage.parse_url(url))).trials


def test_a_sweep_goes_on_after_its_process_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/shared/study.db"
    victim = started(tmp_path, 50)
    try:
        killed_in = _wait_for_the_second_trial(victim, tmp_path, url)
        os.kill(victim.pid, signal.SIGKILL)
    finally:
        victim.kill()
        victim.communicate()
    first = (tmp_path / "shared" / "trial-0" / "record.json").stat().st_mtime_ns
    trials = stored_trials(url)
    done = sum(trial.state == TrialState.COMPLETE for trial in trials)
    assert [trial.number for trial in trials if trial.state == TrialState.RUNNING] == [killed_in]

    for module in (storage, study):
        monkeypatch.setattr(module, "GRACE", 2)
    assert cli.main(["sweep", *WORDS, "--output", str(tmp_path), "--trials", str(done + 1)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["trials"] == {"complete": done + 1, "interrupted": 1}
    record = SweepRecord.load(Path(answer["record"]))
    assert [trial["number"] for trial in record.trials if trial["state"] == "interrupted"] == [killed_in]
    assert not (tmp_path / "shared" / f"trial-{killed_in}" / "checkpoints").exists()
    assert (tmp_path / "shared" / "trial-0" / "record.json").stat().st_mtime_ns == first, "what was done is not redone"


def _wait_for_the_second_trial(process: subprocess.Popen[str], output: Path, url: str) -> int:
    """Waits until one trial is complete and another has begun to train; returns the other's number."""
    begun = output / "shared" / "trial-1" / "config.yaml"
    wait_until(lambda: begun.exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()

    def running() -> list[int]:
        last = stored_trials(url)[-1]
        return [last.number] if last.state == TrialState.RUNNING and last.params else []

    return wait_until(running)[0]


ERRORS = {
    "no trials": (["--trials", "0"], "trials: expected a whole number >= 1, found 0"),
    "seed": (["--trials", "1", "--seed", "-1"], "--seed: expected a whole number >= 0, found -1"),
    "storage": (["--trials", "1", "--storage", "nosuch://me:secret@host/x"], "storage nosuch://host/x: Can't load"),
    "data": (["--trials", "1", "task.data_dir=nowhere", "task.name=sst2"], "task.data_dir=nowhere is not a folder"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_user_error_is_one_message_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = ERRORS[case]
    assert cli.main(["sweep", "--output", str(tmp_path), *words[:2], *WORDS, *words[2:]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "secret" not in error


def test_without_optuna_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optuna" else find(name))
    assert cli.main(["sweep", *WORDS, "--output", str(tmp_path), "--trials", "1"]) == 2
    assert "python -m pip install -e '.[sweep]'" in capsys.readouterr().err
