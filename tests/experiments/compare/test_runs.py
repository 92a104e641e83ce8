from __future__ import annotations

from pathlib import Path

import pytest

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.records import RunRecord, peak_memory
from lora_hf.data.tasks.registry import get_task
from lora_hf.experiments.compare.configurations import group_runs
from lora_hf.experiments.compare.runs import FinishedRun, memory_parts

HISTORY = [
    {"step": 5, "loss": 0.9},
    {"step": 10, "eval_validation_accuracy": 0.5},
    {"step": 20, "eval_validation_accuracy": 0.8},
    {"step": 30, "eval_validation_accuracy": 0.7},
    {"step": 40, "train_loss": 0.6},
]


def record(precision: str = "bf16", cuda: int = 0, **train: object) -> RunRecord:
    config = RunConfig.from_dict({"model": {"precision": precision}, "train": train}).to_dict()
    return RunRecord(
        task="sst2",
        method="lora",
        model="m",
        config=config,
        seed=3,
        started="",
        parameters={"total": 1_000, "trainable": 100},
        metrics={"validation": {"accuracy": 0.8}},
        history=HISTORY,
        timings={"train": 80.0},
        memory={"rss": 9_000, "cuda": cuda},
    )


def run() -> FinishedRun:
    return FinishedRun(Path(), record(), get_task("sst2"))


def test_time_to_a_quality_is_that_of_the_first_evaluation_with_it() -> None:
    assert run().time_to(0.5) == 80 * 10 / 40
    assert run().time_to(0.6) == 80 * 20 / 40
    assert run().time_to(0.81) is None
    assert run().best_evaluation == 0.8


def test_curves_are_the_history() -> None:
    assert run().curves == {"seed": 3, "loss": [[5, 0.9]], "score": [[10, 0.5], [20, 0.8], [30, 0.7]]}


def seeded(seed: int, start: str | None = None, **task: object) -> FinishedRun:
    found = record(start_from=start, seed=seed)
    found.config = RunConfig.from_dict({**found.config, "task": {**found.config["task"], **task}}).to_dict()
    found.seed, found.rows = seed, {"train": 8, "validation": 4}
    return FinishedRun(Path(str(seed)), found, get_task("sst2"))


@pytest.mark.parametrize("starts", [(0, 1), (0, 0)])
def test_seeds_of_a_suite_that_start_from_mnli_are_one_configuration(starts: tuple[int, int]) -> None:
    runs = [seeded(seed, f"glue/mnli-recipe-seed{start}/adapter") for seed, start in enumerate(starts)]
    (found,) = group_runs(runs)
    assert (len(found.runs), found.differs) == (2, {})
    assert len(group_runs([*runs, seeded(2, "glue/mnli-other-seed0/adapter")])) == 2


@pytest.mark.parametrize("other", [{"split_seed": 1}, {"validation": 0.2}, {"train_on": "last"}])
def test_scores_on_other_rows_are_not_compared(other: dict[str, object]) -> None:
    same, changed = group_runs([seeded(0), seeded(1), seeded(0, **other)])
    assert (same.same_data, changed.same_data) == (True, False)
    assert f"task.{next(iter(other))}" in changed.differs["data"]


def test_memory_by_part_by_hand() -> None:
    parts = memory_parts(record())
    assert list(parts.values()) == [1_800, 400, 400, 800, 5_600]
    assert sum(parts.values()) == peak_memory(record().memory) == 9_000
    assert memory_parts(record("fp32"))["frozen weights"] == 3_600
    assert memory_parts(record(hf={"optim": "sgd"}))["AdamW's moments"] == 0
    assert sum(memory_parts(record(cuda=7_000)).values()) == 7_000
