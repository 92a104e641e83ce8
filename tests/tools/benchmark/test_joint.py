"""Joint training from the command line: `train` with several configs, `benchmark glue --joint`, and its benchmark."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_hf.cli.main import main
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.experiments.suite.plan import SuiteOptions, plan_suite
from lora_hf.experiments.suite.run import _next_ready
from tests.tolerances import JOINT_FP32
from tools.benchmark.__main__ import main as benchmark
from tools.benchmark.joint import _run_side

pytestmark = pytest.mark.full

FAST = ["model.precision=fp32", "train.max_steps=3", "train.batch_size=4", "train.lr=1e-4", "task.max_length=32"]


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_train_with_several_configs_trains_jointly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "rule_sentiment.yaml", "--config", "tiny_glue_qv8.yaml", "task.name=rule-sentiment"]
    output = [f"output.dir={tmp_path}", "--json", *FAST]
    assert main([*words, *output], verb="train") == 0
    runs = last_json(capsys)["runs"]
    assert [re.sub(r"(-\d+){3}$", "", Path(run["run"]).name) for run in runs] == [
        "rule_sentiment",
        "tiny_glue_qv8",
    ]
    for run in runs:
        record = json.loads((Path(run["run"]) / "record.json").read_text(encoding="utf-8"))
        assert record["together"] == 2
        assert record["metrics"] == run["metrics"]
    assert main([*words, *output, "--resume", "auto"], verb="train") == 2
    assert "save no checkpoints" in capsys.readouterr().err


def test_a_suite_trains_its_lora_runs_jointly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["glue", "--tasks", "rule-sentiment", "--seeds", "0,1", "--config", "tiny_glue_qv8.yaml"]
    where = ["--output", str(tmp_path), *FAST]
    assert main([*words, *where, "--joint", "4", "--json"], verb="benchmark") == 0
    record = last_json(capsys)
    assert {run["folder"]: run["together"] for run in record["runs"]} == {
        "rule-sentiment-tiny_glue_qv8-seed0": 2,
        "rule-sentiment-tiny_glue_qv8-seed1": 2,
    }
    assert not list(tmp_path.glob("*/checkpoints"))
    assert main([*words, *where, "--joint", "0"], verb="benchmark") == 2
    assert "joint: expected a whole number >= 1, found 0" in capsys.readouterr().err


def test_only_lora_runs_train_jointly(tmp_path: Path) -> None:
    configs = ("tiny_glue_qv8.yaml", "tiny_glue_all16.yaml", "tiny_glue_head.yaml", "tiny_glue_full.yaml")
    runs = plan_suite(SuiteOptions(("rule-sentiment",), tmp_path, seeds=(0, 1), configs=configs))
    names = [f"{run.configuration} {run.config.train.seed}" for run in _next_ready(runs, set(), 3)]
    assert names == ["tiny_glue_qv8 0", "tiny_glue_all16 0", "tiny_glue_qv8 1"]
    assert len(_next_ready(runs, set(), 1)) == 1
    (runs[0].folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    assert _next_ready(runs, set(), 3) == runs[:1], "a run that can resume does so alone"
    heads = [run for run in runs if run.config.train.method == "head"]
    assert _next_ready(heads, set(), 3) == heads[:1]


def test_the_benchmark_measures_both_sides_and_compares_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "joint.json"
    words = ["joint", "--tasks", "rule-sentiment", "--seeds", "0,1", "--steps", "3", "--batch-size", "4"]
    assert benchmark([*words, "--rounds", "1", "--output", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["work"]["runs"] == ["rule-sentiment-seed0", "rule-sentiment-seed1"]
    seconds = {side: measured["seconds"][0] for side, measured in record["sides"].items()}
    assert record["ratios"]["together/apart"]["median"] == seconds["apart"] / seconds["together"]
    assert record["sides"]["apart"]["examples_per_second"]["median"] == 2 * 3 * 4 / seconds["apart"]
    for each in record["weights_apart"].values():
        assert each["difference"] < JOINT_FP32 < each["largest"]
    assert "times as fast" in capsys.readouterr().out
    assert benchmark([*words[:3], "--rounds", "1", "--steps", "3"]) == 2
    assert "expected at least 2 runs, found 1" in capsys.readouterr().err


def test_an_invalid_config_is_reported() -> None:
    config = RunConfig.from_dict({"model": {"name": "tiny-roberta"}, "task": {"name": "rule-sentiment"}})
    huge = replace(config, lora=replace(config.lora, r=4096))
    with pytest.raises(ConfigError, match=r"benchmark: apart: lora\.r"):
        _run_side("apart", [huge])
