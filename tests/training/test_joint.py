"""Runs that share a base and their batches leave what each leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import DataError, TrainingError
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.training.joint import train_together
from lora_hf.training.run import Run, train
from tests.tolerances import JOINT_FP32

pytestmark = pytest.mark.full

# AdamW divides by the size of a gradient: where that is next to nothing it makes full steps of rounding noise, which
# differs between CPUs. SGD's steps are as exact as the gradients, so whole runs can be compared.
SGD = {"optim": "sgd"}
LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_validation_loss")
SENTENCES = ["a man is walking", "two dogs play in the snow", "the stock fell", "she sings", "it rains again today"]


def rows() -> dict[str, dict[str, Dataset]]:
    """Few rows of two tasks, which differ in their columns, lengths and heads."""
    sentiment = get_task("rule-sentiment").load(None, ("train", "validation"))
    pairs = Dataset.from_dict(
        {
            "sentence1": SENTENCES * 6,
            "sentence2": (SENTENCES[1:] + SENTENCES[:1]) * 6,
            "label": [float(n % 6) for n in range(30)],
        }
    )
    return {
        "rule-sentiment": {split: part.select(range(40)) for split, part in sentiment.items()},
        "stsb": {"train": pairs, "validation": pairs},
    }


def config(folder: Path, name: str, task_name: str = "rule-sentiment", **sections: Any) -> RunConfig:
    train = {"epochs": 2, "batch_size": 8, "eval_batch_size": 64, "lr": 0.05, "hf": SGD} | sections.pop("train", {})
    wanted = {
        "model": {"name": "tiny-roberta", "precision": "fp32"},
        "task": {"name": task_name, "max_length": 64},
        "lora": {"r": 4, "targets": ["q", "v"]},
        "train": train,
        "output": {"dir": str(folder), "name": name},
    }
    return RunConfig.from_dict({key: value | sections.get(key, {}) for key, value in wanted.items()})


def differing(folder: Path) -> list[RunConfig]:
    """Each with another seed, learning rate, task, head, number of steps, rank, targets, batch or accumulation."""
    every_2 = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    return [
        config(folder, "first"),
        config(
            folder,
            "second",
            train={"seed": 1, "lr": 0.1, "patience": 1, "loraplus_lr_ratio": 4, "hf": {**SGD, **every_2}},
        ),
        config(folder, "third", "stsb", lora={"r": 8, "targets": ["all"]}, train={"batch_size": 6}),
        config(folder, "fourth", train={"batch_size": 4, "gradient_accumulation": 3, "seed": 2}),
    ]


def furthest(first: Run, second: Run) -> float:
    one, other = (read_adapter(run.weights).tensors for run in (first, second))
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Run], list[Run]]:
    folder, read = tmp_path_factory.mktemp("joint"), rows()
    alone = [train(each, rows=read[each.task.name]) for each in differing(folder / "alone")]
    together = train_together(differing(folder / "together"), rows=read)
    assert all(isinstance(run, Run) for run in together)
    return alone, together  # type: ignore[return-value]


def test_each_run_ends_as_it_would_alone(both: tuple[list[Run], list[Run]]) -> None:
    alone, together = both
    for one, other in zip(alone, together, strict=True):
        assert furthest(one, other) < JOINT_FP32, one.folder.name
        assert one.record.parameters == other.record.parameters
        assert one.record.best == pytest.approx(other.record.best, abs=JOINT_FP32)
        assert (one.record.together, other.record.together) == (1, 4)
        for before, after in zip(one.record.history, other.record.history, strict=True):
            values = [{key: log[key] for key in LOGGED if key in log} for log in (before, after)]
            assert values[1] == pytest.approx(values[0], abs=10 * JOINT_FP32)
    assert furthest(alone[0], together[3]) > 100 * JOINT_FP32, "other runs would pass for the same"
    stopped = together[1].record
    assert stopped.best["step"] < stopped.history[-1]["step"] < 10, "patience ends the run early, with its best weights"


def test_each_run_folder_holds_what_the_run_alone_leaves_but_checkpoints(both: tuple[list[Run], list[Run]]) -> None:
    for one, other in zip(*both, strict=True):
        names = [{str(file.relative_to(run.folder)) for file in run.folder.rglob("*")} for run in (one, other)]
        checkpoints = [{name for name in each if name.startswith("checkpoints/")} for each in names]
        assert not checkpoints[1]
        assert names[0] - checkpoints[0] == names[1]
        found = [(run.folder / "predictions-validation.jsonl").read_text().splitlines() for run in (one, other)]
        read: Any = rows()[other.record.task]["validation"].to_dict()
        logits = Predictor.load(find_saved_model(other.weights)).logits(read)
        for before, after, loaded in zip(*found, logits, strict=True):
            assert json.loads(after)["logits"] == pytest.approx(json.loads(before)["logits"], abs=10 * JOINT_FP32)
            assert json.loads(after)["logits"] == pytest.approx(list(loaded), abs=10 * JOINT_FP32)


def test_writers_train_together(tmp_path: Path) -> None:
    read = get_task("rule-restaurants").load(None, ("train", "validation"))
    read = {split: part.select(range(24)) for split, part in read.items()}
    sections = {"model": {"name": "tiny-gpt2"}, "task": {"max_length": 128}}
    more = ({"epochs": 1}, {"epochs": 1, "seed": 1, "lr": 0.1, "gradient_accumulation": 2, "batch_size": 4})
    runs: list[list[Any]] = []
    for folder in ("alone", "together"):
        configs = [
            config(tmp_path / folder, f"run{number}", "rule-restaurants", **sections, train=settings)
            for number, settings in enumerate(more)
        ]
        alone = folder == "alone"
        runs.append(
            [train(each, rows=read) for each in configs]
            if alone
            else train_together(configs, rows={"rule-restaurants": read})
        )
    for one, other in zip(*runs, strict=True):
        assert furthest(one, other) < JOINT_FP32
        losses = [[entry["loss"] for entry in run.record.history if "loss" in entry] for run in (one, other)]
        assert losses[1] == pytest.approx(losses[0], abs=10 * JOINT_FP32)


class EndAt(TrainerCallback):
    """Ends its run at the first evaluation: with its results, or with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.error:
            raise self.error
        control.should_training_stop = True


def test_runs_that_end_early_leave_the_others_alone(tmp_path: Path, both: tuple[list[Run], list[Run]]) -> None:
    broken = config(tmp_path, "broken", train={"lr": 1e30, "max_grad_norm": 0})
    configs = [broken, config(tmp_path, "pruned"), config(tmp_path, "stopped"), config(tmp_path, "first")]
    callbacks: list[list[TrainerCallback]] = [[], [EndAt(KeyError("pruned"))], [EndAt()], []]
    ill, pruned, stopped, well = train_together(configs, rows(), callbacks, catch=(KeyError,))
    assert isinstance(ill, TrainingError)
    assert "the loss is" in str(ill)
    assert isinstance(pruned, KeyError)
    assert isinstance(stopped, Run)
    assert stopped.record.history[-1]["epoch"] == 1
    assert isinstance(well, Run)
    assert furthest(well, both[0][0]) < JOINT_FP32
    finished = {file.parent.name for file in tmp_path.glob("*/record.json")}
    assert finished == {"stopped", "first"}
    with pytest.raises(KeyError, match="pruned"):
        train_together([replace_name(each) for each in configs[1:3]], rows(), callbacks[1:3])


def replace_name(config: RunConfig) -> RunConfig:
    return replace(config, output=replace(config.output, name=f"{config.output.name}-again"))


def test_a_mistake_in_one_stops_all_before_anything_is_trained(tmp_path: Path) -> None:
    configs = [config(tmp_path, "first"), config(tmp_path, "second", "mrpc", task={"data_dir": str(tmp_path / "none")})]
    with pytest.raises(DataError, match="mrpc"):
        train_together(configs, rows=rows())
    assert not list(tmp_path.glob("*/record.json"))
