"""Runs that share a base and their batches leave what each leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lora_hf.adapters.format import read_adapter
from lora_hf.adapters.resolve import find_saved_model
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, DataError, TrainingError
from lora_hf.data.tasks.registry import get_task
from lora_hf.inference.classify import Predictor
from lora_hf.training.joint import train_together
from lora_hf.training.run import Run, train
from tests.tolerances import JOINT_FP32

# AdamW divides by the size of a gradient: where that is next to nothing it makes full steps of rounding noise, which
# differs between CPUs. SGD's steps are as exact as the gradients, so whole runs can be compared.
SGD = {"optim": "sgd"}
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
    return [
        config(folder, "first"),
        config(folder, "second", train={"seed": 1, "lr": 0.1, "epochs": 1}),
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


def test_each_adapter_is_what_it_becomes_alone(both: tuple[list[Run], list[Run]]) -> None:
    alone, together = both
    for one, other in zip(alone, together, strict=True):
        assert furthest(one, other) < JOINT_FP32, one.folder.name
    assert furthest(alone[0], together[3]) > 100 * JOINT_FP32, "other runs would pass for the same"


def test_each_run_folder_holds_what_the_run_alone_would_have_left(both: tuple[list[Run], list[Run]]) -> None:
    for one, other in zip(*both, strict=True):
        names = [sorted(str(file.relative_to(run.folder)) for file in run.folder.rglob("*")) for run in (one, other)]
        assert names[0] == names[1]
        assert one.record.parameters == other.record.parameters
        assert one.record.best == pytest.approx(other.record.best, abs=JOINT_FP32)
        assert (one.record.together, other.record.together) == (1, 4)
        steps = [[entry for entry in run.record.history if "loss" in entry] for run in (one, other)]
        assert len(steps[0]) == len(steps[1]) > 0
        for before, after in zip(*steps, strict=True):
            assert after["loss"] == pytest.approx(before["loss"], abs=JOINT_FP32)
            assert after["learning_rate"] == before["learning_rate"]
        found = [(run.folder / "predictions-validation.jsonl").read_text().splitlines() for run in (one, other)]
        for before, after in zip(*found, strict=True):
            assert json.loads(after)["logits"] == pytest.approx(json.loads(before)["logits"], abs=10 * JOINT_FP32)


def test_the_adapters_answer_from_their_folders(both: tuple[list[Run], list[Run]]) -> None:
    for run in both[1]:
        lines = [json.loads(line) for line in (run.folder / "predictions-validation.jsonl").read_text().splitlines()]
        read = rows()[run.record.task]["validation"].to_dict()
        logits = Predictor.load(find_saved_model(run.weights)).logits(read)
        torch.testing.assert_close(
            torch.tensor(logits), torch.tensor([line["logits"] for line in lines]), atol=10 * JOINT_FP32, rtol=0
        )


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


def test_a_run_that_breaks_leaves_the_others_alone(tmp_path: Path, both: tuple[list[Run], list[Run]]) -> None:
    broken = config(tmp_path, "broken", train={"lr": 1e30, "max_grad_norm": 0})
    well, ill = train_together([config(tmp_path, "first"), broken], rows=rows())
    assert isinstance(ill, TrainingError)
    assert not (tmp_path / "broken" / "record.json").exists()
    assert isinstance(well, Run)
    assert furthest(well, both[0][0]) < JOINT_FP32


def test_a_mistake_in_one_stops_all_before_anything_is_trained(tmp_path: Path) -> None:
    configs = [config(tmp_path, "first"), config(tmp_path, "second", "mrpc", task={"data_dir": str(tmp_path / "none")})]
    with pytest.raises(DataError, match="mrpc"):
        train_together(configs, rows=rows())
    assert not list(tmp_path.glob("*/record.json"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": {"method": "head"}}, "run 2: train.method=head"),
        ({"lora": {"init_lora_weights": "pissa"}}, "run 2: lora.init_lora_weights=pissa"),
        ({"lora": {"bias": "all"}}, "run 2: lora.bias=all"),
        ({"train": {"label_smoothing": 0.1}}, "run 2: train.label_smoothing: expected 0"),
        ({"model": {"precision": "bf16"}}, "the same model section"),
        ({"task": {"name": "e2e_nlg"}}, "tasks of one kind"),
        ({"task": {"data_dir": "elsewhere"}}, "the same task section"),
        ({"output": {"name": "first"}}, "output.name: expected a different one"),
    ],
)
def test_what_cannot_share_a_base_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot train together") as refusal:
        train_together([config(tmp_path, "first"), config(tmp_path, "second", **changed)])
    assert said in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_one_run_random_bases_and_one_checkpoint_for_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume=.*a checkpoint belongs to one run, found 2"):
        train_together(differing(tmp_path)[:2], resume=str(tmp_path))
    with pytest.raises(ConfigError, match="at least 2 runs, found 1"):
        train_together([config(tmp_path, "first")])
    random = {"model": {"init": "random"}}
    with pytest.raises(ConfigError, match="another base for each"):
        train_together([config(tmp_path, "a", **random), config(tmp_path, "b", **random, train={"seed": 1})])
