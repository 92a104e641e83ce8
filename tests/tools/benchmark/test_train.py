from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from lora_hf.cli.main import main
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from tools.benchmark import process, train
from tools.benchmark.process import SideProcess
from tools.benchmark.train import benchmark_train, take_turns
from tools.benchmark.work import Work, sides_of

pytestmark = pytest.mark.usefixtures("forked")

WORK = Work("peft-best", {}, [], rounds=2, peak_seconds=0.0)


def config(task: str = "rule-sentiment") -> RunConfig:
    return RunConfig.from_dict({"model": {"name": "tiny-roberta"}, "task": {"name": task}, "train": {"batch_size": 4}})


def script(*lines: str) -> tuple[str, ...]:
    """A worker process that does what these lines of Python say."""
    return (sys.executable, "-c", "\n".join(["import sys, time, os", *lines]))


def test_a_record_of_two_sides_in_processes(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    sizes = ["--batch-size", "4", "--steps", "2", "--rounds", "2"]
    words = ["train", *sizes, "--against", "frozen", "--json", "--output", str(output)]
    assert main(words, verb="benchmark") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text(encoding="utf-8"))
    assert result["work"]["rows"] == 8
    assert set(result["sides"]) == {"lora", "frozen"}
    assert set(result["ratios"]) == set(result["memory_ratios"]) == {"lora/frozen"}
    speeds = ("examples_per_second", "tokens_per_second", "share_of_peak")
    spreads = [side[speed] for side in result["sides"].values() for speed in speeds]
    for spread in (*spreads, *result["ratios"].values(), result["peak"]["bf16_flops_per_second"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert len(result["sides"]["lora"]["seconds"]) == 2  # the warm-up is not among them
    assert result["sides"]["lora"]["trained_parameters"] > result["sides"]["frozen"]["trained_parameters"]
    assert result["machine"]["threads"] == 1
    assert not re.search(r'"/|\.\./', output.read_text(encoding="utf-8"))  # no place on this machine


def test_rounds_alternate_and_the_warm_up_is_dropped() -> None:
    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def run_round(self) -> dict[str, Any]:
            calls.append(self.name)
            return {"seconds": float(len(calls))}

    calls: list[str] = []
    measured = take_turns({name: Side(name) for name in "abc"}, rounds=2)
    assert "".join(calls) == "abcbcacab"
    assert [each["seconds"] for each in measured["a"]] == [6.0, 8.0]


def test_what_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"expected some of peft, .*, found 'lorelib' \(did you mean 'loralib'\?\)"):
        benchmark_train(config(), ["lorelib"])
    with pytest.raises(ConfigError, match="--against head: a language model has no head"):
        benchmark_train(config("rule-restaurants"), ["head"])
    with pytest.raises(ConfigError, match="--steps 0"):
        benchmark_train(config(), ["full"], steps=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="peft is not installed; run pip install peft"):
        sides_of(["peft"], "causal-lm")


def test_peft_stands_for_both_of_its_settings() -> None:
    assert sides_of(["peft", "full", "full"], "causal-lm") == ("lora", "peft-default", "peft-best", "full")


def test_an_output_that_cannot_be_written_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output", "no-such-folder/record.json"], verb="benchmark") == 2
    assert "no-such-folder" in capsys.readouterr().err


def test_a_side_that_dies_says_why() -> None:
    with pytest.raises(TrainingError, match=r"process of peft-best ended early \(exit 3\)\n  no memory for this"):
        SideProcess(WORK, script("sys.stderr.write('no memory for this\\n')", "sys.exit(3)"))
    dies_later = script(
        "sys.stdin.readline()",
        "print('{\"ready\": {}}', flush=True)",
        "sys.stdin.readline()",
        "os.kill(os.getpid(), 9)",
    )
    side = SideProcess(WORK, dies_later)
    with pytest.raises(TrainingError, match="killed by signal 9"):
        side.run_round()
    side.stop()


def test_a_side_says_what_a_person_did_wrong() -> None:
    with pytest.raises(ConfigError, match=r"peft-best: lora\.r is too large"):
        SideProcess(WORK, script("sys.stdin.readline()", 'print(\'{"error": "lora.r is too large"}\')'))


def test_no_process_outlives_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[SideProcess] = []

    class Noted(SideProcess):
        def __init__(self, work: Work) -> None:
            if started:
                raise TrainingError("the second does not start")
            super().__init__(
                work, script("sys.stdin.readline()", "print('{\"ready\": {}}', flush=True)", "time.sleep(99)")
            )
            started.append(self)

    monkeypatch.setattr(train, "SideProcess", Noted)
    monkeypatch.setattr(process, "TAIL", 1)
    with pytest.raises(TrainingError, match="second"):
        benchmark_train(config(), ["full"], steps=1, rounds=1)
    assert started[0].process.poll() is not None
