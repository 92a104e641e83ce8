"""The plan of a run: it says what the run then does, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_hf.cli.main import main
from lora_hf.core.records import RunRecord
from lora_hf.training.estimate import Estimate

SHORT = ["model.precision=fp32", "train.hf={use_cpu: true}", "train.batch_size=16", "train.max_steps=8"]


@pytest.mark.full
@pytest.mark.parametrize("plots", ["true", "false"])
def test_a_plan_says_what_the_run_then_does(plots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "rule_sentiment.yaml", *SHORT, f"output.dir={tmp_path / 'runs'}", "output.name=mine"]
    words.append(f"output.plots={plots}")
    assert main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not (tmp_path / "runs").exists()
    assert main(["train", *words]) == 0
    record = RunRecord.load(tmp_path / "runs" / "mine" / "record.json")
    assert plan["folder"] == str(tmp_path / "runs" / "mine")
    assert plan["parameters"] == record.parameters
    planned = sorted(path for paths in plan["modules"].values() for path in paths)
    assert planned == sorted(site["path"] for site in record.sites)
    assert plan["steps"] == 8
    assert plan["data"]["splits"]["train"]["rows"] == record.rows["train"]
    written = {path.name + "/" * path.is_dir() for path in (tmp_path / "runs" / "mine").iterdir()}
    assert set(plan["files"]) <= written
    assert {name for name in written if name.endswith(".png")} == {name for name in plan["files"] if ".png" in name}
    assert any(name.endswith(".png") for name in written) == (plots == "true")
    estimate = record.estimate
    assert estimate["memory"]["weights"] == plan["estimate"]["memory"]["weights"]
    assert estimate["seconds_ratio"] == pytest.approx(record.timings["train"] / estimate["seconds"])
    assert estimate["memory_ratio"] == pytest.approx(record.memory["rss"] / sum(estimate["memory"].values()))


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        (["plan"], "rule_sentiment.yaml"),
        pytest.param(["train", "--dry-run"], "rule_restaurants.yaml", marks=pytest.mark.full),
    ],
)
def test_a_plan_for_reading(verb: list[str], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--config", config, *SHORT, f"output.dir={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    for fact in (
        "train: ",
        "tokens: median",
        "95th percentile",
        "row 0: ",
        "adapts q: ",
        "trains ",
        "8 steps",
        " GB (weights",
        "record.json",
    ):
        assert fact in out, fact
    assert ("<<" in out) == ("restaurants" in config), "only a completion has parts that are trained"
    assert list(tmp_path.iterdir()) == []
    assert "steps: loss" not in err


def test_a_plan_reports_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "rule_sentiment.yaml", "lora.targets=nothing.here"]) == 2
    assert "nothing.here" in capsys.readouterr().err


def test_one_step_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with patience, which ends a run by its evaluations."""
    words: list[Any] = ["--config", "rule_sentiment.yaml", *SHORT[:3], "train.max_steps=1", f"output.dir={tmp_path}"]
    words.append("train.patience=1")
    assert main(["plan", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["estimate"]["seconds"] > 0


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (41.6, "42 s"), (59.7, "1.0 min"), (150, "2.5 min")])
def test_a_short_training_is_estimated_in_seconds(seconds: float, words: str) -> None:
    line = Estimate(seconds, {"weights": 1_500_000_000}).line()
    assert line == f"training takes about {words} and 1.50 GB (weights 1.50)"
