from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from lora_hf.core.child_process import ChildProcesses
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from tools.benchmark import rounds
from tools.benchmark.__main__ import main
from tools.benchmark.job import Job, train_sides
from tools.benchmark.rounds import run_rounds
from tools.benchmark.train import benchmark_train, check_shares
from tools.benchmark.worker_process import WorkerProcess

JOB = Job("peft-best", {}, [], rounds=2)


def config(task: str = "rule-sentiment") -> RunConfig:
    return RunConfig.from_dict({"model": {"name": "tiny-roberta"}, "task": {"name": task}, "train": {"batch_size": 4}})


def script(*lines: str) -> tuple[str, ...]:
    """The command of a process that runs these lines of Python in place of a worker."""
    return (sys.executable, "-c", "\n".join(["import sys, time, os", *lines]))


@pytest.mark.full
def test_the_command_writes_a_record_of_two_sides(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    sizes = ["--batch-size", "4", "--steps", "2", "--rounds", "2"]
    assert main(["train", *sizes, "--against", "frozen", "--output", str(output)]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["lora", "frozen", "lora/frozen"]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["work"]["rows"] == 8
    assert set(result["sides"]) == {"lora", "frozen"}
    assert set(result["ratios"]) == set(result["memory_ratios"]) == {"lora/frozen"}
    speeds = ("examples_per_second", "tokens_per_second", "share_of_peak")
    spreads = [side[speed] for side in result["sides"].values() for speed in speeds]
    for spread in (*spreads, *result["ratios"].values(), result["peak"]["flops_per_second"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert len(result["sides"]["lora"]["seconds"]) == 2  # without the warm-up
    assert result["sides"]["lora"]["trained_parameters"] > result["sides"]["frozen"]["trained_parameters"]
    assert result["machine"]["threads"] == 1
    assert not re.search(r'"/|\.\./', output.read_text(encoding="utf-8")), "a record holds no path of this machine"


def test_sides_alternate_and_the_warm_up_is_dropped() -> None:
    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def run_round(self) -> dict[str, Any]:
            calls.append(self.name)
            return {"seconds": float(len(calls))}

    calls: list[str] = []
    counted = run_rounds({name: Side(name) for name in "abc"}, rounds=2)
    assert "".join(calls) == "abcbcacab"
    assert [each["seconds"] for each in counted["a"]] == [6.0, 8.0]


def test_invalid_options_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--against: .*'lorelib'.*'loralib'"):
        benchmark_train(config(), ["lorelib"])
    with pytest.raises(ConfigError, match=r"--against head: .*no head"):
        benchmark_train(config("rule-restaurants"), ["head"])
    with pytest.raises(ConfigError, match="--steps 0"):
        benchmark_train(config(), ["full"], steps=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft .*pip install peft"):
        train_sides(["peft"], "causal-lm")


def test_a_share_above_the_peak_is_an_error() -> None:
    check_shares({"lora": {"median": 0.5, "min": 0.4, "max": 1.2}})
    with pytest.raises(TrainingError, match="frozen reached 243% of the peak"):
        check_shares({"lora": {"median": 0.5}, "frozen": {"median": 2.43}})


def test_peft_stands_for_both_of_its_settings() -> None:
    assert train_sides(["peft", "full", "full"], "causal-lm") == ("lora", "peft-default", "peft-best", "full")


def test_a_missing_output_folder_is_reported_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output", "no-such-folder/record.json"]) == 2
    assert "no-such-folder" in capsys.readouterr().err


@pytest.fixture
def children() -> Iterator[ChildProcesses]:
    with ChildProcesses() as children:
        yield children


def test_the_death_of_a_worker_is_reported_with_its_standard_error(children: ChildProcesses) -> None:
    with pytest.raises(TrainingError, match=r"peft-best .*3\)\n  no memory for this"):
        WorkerProcess(children, JOB, script("sys.stderr.write('no memory for this\\n')", "sys.exit(3)"))
    dies_later = script(
        "sys.stdin.readline()",
        "print('{\"ready\": {}}', flush=True)",
        "sys.stdin.readline()",
        "os.kill(os.getpid(), 9)",
    )
    with closing(WorkerProcess(children, JOB, dies_later)) as side, pytest.raises(TrainingError, match="signal 9"):
        side.run_round()


def test_a_worker_reports_an_invalid_config(children: ChildProcesses) -> None:
    with pytest.raises(ConfigError, match=r"peft-best: lora\.r is too large"):
        WorkerProcess(children, JOB, script("sys.stdin.readline()", 'print(\'{"error": "lora.r is too large"}\')'))


def test_workers_end_when_a_benchmark_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[WorkerProcess] = []

    class SecondFails(WorkerProcess):
        def __init__(self, children: ChildProcesses, job: Job) -> None:
            if started:
                raise TrainingError("the second does not start")
            ready = script("sys.stdin.readline()", "print('{\"ready\": {}}', flush=True)", "time.sleep(99999)")
            super().__init__(children, job, ready)
            started.append(self)

    monkeypatch.setattr(rounds, "WorkerProcess", SecondFails)
    with pytest.raises(TrainingError, match="second"):
        benchmark_train(config(), ["full"], steps=1, rounds=1)
    assert started[0].process.poll() is not None
