"""`lr-find`: the order of the rates, what is stopped, what the advice says, and what the recipe holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from lora_hf.cli import main as cli
from lora_hf.core.config.loader import load_config
from lora_hf.core.config.schema import OutputConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.records import RunRecord, SweepRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.sweep import trials
from lora_hf.experiments.sweep.lr_find import advice, format_rate, lr_find, read_lr_find
from lora_hf.training.run import train

WORDS = ["train.batch_size=8", "task.max_length=24", "model.precision=fp32"]
RATES = ("1e-6", "3e-3", "1e-2", "1e36")
STEPS = 16


def test_the_rates_are_tried_from_the_middle() -> None:
    _, space = read_lr_find("rule_sentiment.yaml", [], ["1e-2", "1e-4", "1e-3", "1e-5", "1e-1"])
    assert space.words() == ["train.lr=1e-3|1e-4|1e-2|1e-5|1e-1"]


@pytest.mark.parametrize(
    ("words", "rates", "said"),
    [
        ([], ["1e-3"], "rates: expected at least two"),
        ([], ["1e-3", "fast"], "rates: expected numbers"),
        ([], ["1e-3", "0.001"], "a choice is given twice"),
        ([], ["1e-3", "-1e-3"], "train.lr: expected a number > 0"),
        (["train.lr=1e-3"], ["1e-3", "1e-4"], "name them with --rates"),
        (["lora.r=4,8"], ["1e-3", "1e-4"], "lr-find varies train.lr only"),
        (["lora.rr=4"], ["1e-3", "1e-4"], "did you mean 'r'"),
    ],
)
def test_what_it_cannot_try(words: list[str], rates: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_lr_find("rule_sentiment.yaml", words, rates)
    assert said in str(caught.value)


@pytest.mark.parametrize(("rate", "text"), [(5e-4, "5e-4"), (1.234e-3, "1.234e-3"), (1.0, "1e0"), (2e36, "2e36")])
def test_a_rate_is_written_as_it_is_typed(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.fixture(scope="module")
def rows() -> dict[str, Dataset]:
    task = get_task("rule-sentiment")
    loaded = task.load(None, task.splits)
    return {split: part.select(range(128 if split == "train" else 220)) for split, part in loaded.items()}


def find(output: Path, rows: dict[str, Dataset], **more: Any) -> tuple[Path, SweepRecord]:
    config, space = read_lr_find("rule_sentiment.yaml", WORDS, RATES)
    config = replace(config, output=OutputConfig(dir=str(output), plots=False))
    return lr_find(config, space, "s", STEPS, rows=rows, **more)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Dataset]) -> tuple[Path, SweepRecord]:
    return find(tmp_path_factory.mktemp("outputs"), rows)


def by_rate(record: SweepRecord) -> dict[float, dict[str, Any]]:
    return {trial["values"]["train.lr"]: trial for trial in record.trials}


@pytest.mark.full
def test_the_losers_stop_early_and_the_record_tells_them_apart(found: tuple[Path, SweepRecord]) -> None:
    folder, record = found
    slow, good, fast, absurd = (by_rate(record)[float(rate)] for rate in RATES)
    assert [trial["values"]["train.lr"] for trial in record.trials] == [1e-2, 3e-3, 1e36, 1e-6]
    assert slow["state"] == "pruned"
    assert slow["steps"] < STEPS
    assert absurd["state"] in ("diverged", "failed")
    assert record.best in (good, fast)
    assert record.best["steps"] == STEPS
    assert sum(trial["steps"] for trial in record.trials) < 3 * STEPS
    best = RunRecord.load(folder / record.best["record"])
    assert best.config["train"]["max_steps"] == STEPS
    assert best.rows == {"train": 128, "validation": 200}, "a sample of a large split"
    for name in ("learning-rate.png", "losses.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_the_recipe_is_the_whole_config_with_the_best_rate(found: tuple[Path, SweepRecord]) -> None:
    folder, record = found
    recipe = load_config(folder / "best.yaml")
    plain = load_config("rule_sentiment.yaml", WORDS)
    assert recipe.train == replace(plain.train, lr=record.best["values"]["train.lr"])
    assert (recipe.lora, recipe.task) == (plain.lora, plain.task)


@pytest.mark.full
def test_an_interrupted_search_goes_on(
    found: tuple[Path, SweepRecord], rows: dict[str, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trials.run_trial, []

    def stopped(*arguments: Any) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trials, "run_trial", stopped)
    with pytest.raises(KeyboardInterrupt):
        find(tmp_path, rows)
    _, record = find(tmp_path, rows)
    assert [trial["state"] for trial in record.trials].count("interrupted") == 1
    ended = {trial["values"]["train.lr"]: trial for trial in record.trials if trial["state"] != "interrupted"}
    for rate, whole in by_rate(found[1]).items():
        assert [ended[rate][key] for key in ("state", "score", "steps")] == [
            whole[key] for key in ("state", "score", "steps")
        ]


@pytest.mark.full
def test_without_a_pruner_every_rate_is_trained_to_the_end(rows: dict[str, Dataset], tmp_path: Path) -> None:
    _, record = find(tmp_path, rows, pruner="none")
    steps = {rate: trial["steps"] for rate, trial in by_rate(record).items() if trial["state"] == "complete"}
    assert steps == dict.fromkeys((1e-6, 3e-3, 1e-2), STEPS)


def entry(rate: float, state: str, steps: int, score: float | None = None) -> dict[str, Any]:
    return {
        "values": {"train.lr": rate},
        "state": state,
        "steps": steps,
        "score": score,
        "record": "trial-0/record.json",
    }


@pytest.mark.parametrize(
    ("best", "majority", "said"),
    [
        (1e-3, 0.6, "use train.lr=1e-3: validation accuracy 0.7000 after 80 steps; 5e-3 diverged at step 40"),
        (1e-4, 0.6, "the best may be lower, so extend --rates"),
        (5e-3, 0.6, "the best may be higher, so extend --rates"),
        (1e-3, 0.7, "no rate beats the majority class yet, so use more --steps"),
    ],
)
def test_the_advice(best: float, majority: float, said: str, tmp_path: Path) -> None:
    tried = {1e-4: entry(1e-4, "pruned", 10), 1e-3: entry(1e-3, "pruned", 10), 5e-3: entry(5e-3, "diverged", 40)}
    tried[best] = entry(best, "complete", 80, 0.7)
    names = {"study": "s", "task": "t", "split": "validation", "metric": "accuracy", "greater_is_better": True}
    record = SweepRecord(**names, config={}, space=[], seed=0, trials=[*tried.values()], best=tried[best])
    (tmp_path / "trial-0").mkdir()
    run = RunRecord("t", "lora", "m", {}, 0, "now", majority={"validation": {"accuracy": majority}})
    run.save(tmp_path / "trial-0")
    assert said in advice(tmp_path, record)


def test_the_steps_are_those_of_the_windows_of_long_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation"):
        words = ["film"] * 200
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"tokens": words, "tags": ["B-A", *["O"] * 199]}) + "\n")
    words = ["task.kind=tokens", "task.name=long", f"task.data_dir={tmp_path}", "task.label_names=[A]"]
    words += ["task.max_length=24", "task.stride=0", "train.batch_size=1", "train.epochs=1", "model.precision=fp32"]
    config, space = read_lr_find("rule_sentiment.yaml", words, ("1e-4", "1e-3"))
    asked: list[Any] = []
    monkeypatch.setattr("lora_hf.experiments.sweep.study.sweep", lambda settings, **_: asked.append(settings))
    lr_find(config, space, "s")
    steps = asked[0].config.train.max_steps
    assert steps > 5, "200 words make several windows"
    run = train(replace(config, output=OutputConfig(dir=str(tmp_path / "outputs"), plots=False)))
    assert run.record.history[-1]["step"] == steps


@pytest.mark.parametrize(("given", "found"), [(None, None), (0, 0), (500, 100)])
def test_the_warmup_keeps_its_share_of_the_steps(
    given: int | None, found: int | None, rows: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, "train.max_steps=1000", f"train.warmup_steps={'null' if given is None else given}"]
    config, space = read_lr_find("rule_sentiment.yaml", words, RATES)
    asked: list[Any] = []
    monkeypatch.setattr("lora_hf.experiments.sweep.study.sweep", lambda settings, **_: asked.append(settings))
    lr_find(config, space, "s", rows=rows)
    assert asked[0].config.train.warmup_steps == found
    assert asked[0].recipe.train.warmup_steps == given


@pytest.mark.full
def test_the_command_prints_a_table_and_the_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lr-find", "--config", "rule_sentiment.yaml", "--rates", "1e-3,1e-2", "--steps", "2", *WORDS]
    assert cli.main([*words, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rate", "trial", "steps", "accuracy", "loss"]
    assert [line.split()[0] for line in lines[1:3]] == ["1e-3", "1e-2"]
    assert lines[4].startswith("use train.lr=1e-")
    assert cli.main([*words, "--output", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["advice"] == lines[4], "a finished search is not repeated"
    assert yaml.safe_load(Path(answer["config"]).read_text())["train"]["lr"] == answer["best"]["values"]["train.lr"]
    assert cli.main([*words[:5], "--steps", "0", "--output", str(tmp_path)]) == 2
    assert "--steps: expected a whole number >= 1, found 0" in capsys.readouterr().err
