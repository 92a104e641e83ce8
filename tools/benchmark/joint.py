"""Measures several runs that train together on one base against the same runs one after another.

A process a side and round, in turns: it is told its runs, and tells what they took.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lora_hf.adapters.format import WEIGHTS_FILE
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, UserError
from lora_hf.core.provenance import git_state, peak_rss, versions
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.precision import resolve_precision
from lora_hf.training.joint import train_together
from lora_hf.training.run import train
from tools.benchmark.process import Channel, Child
from tools.benchmark.train import machine_in_use, summary

logger = logging.getLogger(__name__)

SIDES = ("together", "apart")
MODULE = "tools.benchmark.joint"
DEVELOPMENT_ROWS = 64  # scored at the end of a run, on both sides


def benchmark_joint(base: RunConfig, tasks: Sequence[str], seeds: Sequence[int], rounds: int = 3) -> dict[str, Any]:
    """Measures the runs of each task with each seed; the record of it.

    Args:
        base: what the runs have in common; `train.max_steps` is each one's number of steps.
        rounds: of both sides, each in a new process.

    Returns:
        By side the examples a second from the first run's loading to the last one's scores, and the peak of memory;
        the ratio of both within a round; and by run how far the weights of both sides are apart.

    Raises:
        ConfigError: fewer than two runs, or runs that cannot share a base.
        TrainingError: the process of a side died.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: expected at least 1")
    base = replace(base, model=replace(base.model, precision=resolve_precision(base.model.precision)))
    names = [f"{task}-seed{seed}" for task in tasks for seed in seeds]
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                configs = _configs(base, tasks, seeds, Path(folder) / f"{side}{number}")
                measured[side].append(_in_process(side, configs))
                logger.info("benchmark: round %d of %d, %s: %.1f s", number + 1, rounds, side, _seconds(measured, side))
        apart = {name: _apart(Path(folder), name) for name in names}
    examples = len(names) * (base.train.max_steps or 0) * base.train.batch_size
    seconds = {side: [each["seconds"] for each in measured[side]] for side in SIDES}
    plain = base.to_dict()
    return {
        "work": {
            "model": Path(base.model.name).name,
            "init": base.model.init,
            "precision": base.model.precision,
            "runs": names,
            "lora": plain["lora"],
            "batch_size": base.train.batch_size,
            "steps": base.train.max_steps,
            "lr": base.train.lr,
            "rounds": rounds,
        },
        "sides": {
            side: {
                "examples_per_second": summary([examples / each for each in seconds[side]]),
                "seconds": seconds[side],
                "rss": summary([each["rss"] for each in measured[side]]),
            }
            for side in SIDES
        },
        "ratios": {
            "together/apart": summary([b / a for a, b in zip(seconds["together"], seconds["apart"], strict=True)])
        },
        "weights_apart": apart,
        "machine": machine_in_use(),
        "versions": versions(),
        "git": git_state(),
    }


def _seconds(measured: dict[str, list[dict[str, Any]]], side: str) -> float:
    return measured[side][-1]["seconds"]


def _configs(base: RunConfig, tasks: Sequence[str], seeds: Sequence[int], folder: Path) -> list[RunConfig]:
    return [
        replace(
            base,
            task=replace(base.task, name=task),
            train=replace(base.train, seed=seed),
            output=replace(base.output, dir=str(folder), name=f"{task}-seed{seed}"),
        )
        for task in tasks
        for seed in seeds
    ]


def _in_process(side: str, configs: Sequence[RunConfig]) -> dict[str, Any]:
    order = {"side": side, "configs": [config.to_dict() for config in configs]}
    child = Child(side, json.dumps(order), sys.executable, "-m", MODULE)
    try:
        return child.finish()
    finally:
        child.stop()


def _apart(folder: Path, name: str) -> dict[str, float]:
    """How far the weights of a run's two sides are apart, the largest difference of any number, and their size."""
    one, other = (load_file(folder / f"{side}0" / name / "adapter" / WEIGHTS_FILE) for side in SIDES)
    return {
        "difference": max(float((one[key] - other[key]).abs().max()) for key in one),
        "largest": max(float(tensor.abs().max()) for tensor in other.values()),
    }


def serve(channel: Channel) -> None:
    """Does the work of one side."""
    order = json.loads(channel.wait())
    configs = [RunConfig.from_dict(config) for config in order["configs"]]
    rows: dict[str, Any] = {}
    for config in configs:
        task = get_task(config.task.name)
        if task.name not in rows:
            read = task.load(config.task.data_dir, task.splits)
            few = {split: part.select(range(min(DEVELOPMENT_ROWS, len(part)))) for split, part in read.items()}
            rows[task.name] = few | {task.train_split: read[task.train_split]}
    begin = time.perf_counter()
    try:
        if order["side"] == "together":
            broken = [run for run in train_together(configs, rows=rows) if isinstance(run, UserError)]
            if broken:
                raise broken[0]
        else:
            for config in configs:
                train(config, rows=rows[config.task.name])
    except UserError as error:
        channel.tell(error=str(error))
    else:
        channel.tell(done={"seconds": time.perf_counter() - begin, "rss": peak_rss()})


if __name__ == "__main__":
    serve(Channel.standard())
