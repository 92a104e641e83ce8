"""`joint`: runs that train together on one base, compared with the same runs one after another.

Each side of each round runs in a new process, started as `python -m tools.benchmark.joint`.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lora_hf.adapters.format import WEIGHTS_FILE
from lora_hf.core.child_process import ChildProcesses
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, UserError
from lora_hf.core.provenance import peak_rss
from lora_hf.data.tasks.registry import get_task
from lora_hf.training.joint import train_together
from lora_hf.training.run import train
from tools.benchmark.rounds import environment, speedup, spread, with_resolved_precision
from tools.benchmark.worker_process import Channel, ChildProcess

logger = logging.getLogger(__name__)

SIDES = ("together", "apart")
MODULE = "tools.benchmark.joint"
VALIDATION_ROWS = 64  # scored at the end of each run, on both sides


def benchmark_joint(base: RunConfig, tasks: Sequence[str], seeds: Sequence[int], rounds: int = 3) -> dict[str, Any]:
    """Measures a run of each task with each seed, and returns the record.

    Args:
        base: the config that the runs share. Each run has `train.max_steps` steps.
        rounds: how often each side runs, each time in a new process.

    Returns:
        For each side the examples per second, from loading the first run to scoring the last one, and the peak memory.
        The ratio of the speeds within a round. For each run, the largest difference of its weights between the sides.

    Raises:
        ConfigError: fewer than two runs, or runs that cannot share a base.
        TrainingError: the process of a side ended early.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: expected at least 1")
    base = with_resolved_precision(base)
    names = [f"{task}-seed{seed}" for task in tasks for seed in seeds]
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                configs = _configs(base, tasks, seeds, Path(folder) / f"{side}{number}")
                result = _run_side(side, configs)
                measured[side].append(result)
                logger.info("benchmark: round %d of %d, %s: %.1f s", number + 1, rounds, side, result["seconds"])
        differences = {name: _weight_difference(Path(folder), name) for name in names}
    examples = len(names) * (base.train.max_steps or 0) * base.train.batch_size
    seconds = {side: [each["seconds"] for each in measured[side]] for side in SIDES}
    return {
        "work": {
            "model": Path(base.model.name).name,
            "init": base.model.init,
            "precision": base.model.precision,
            "runs": names,
            "lora": base.to_dict()["lora"],
            "batch_size": base.train.batch_size,
            "steps": base.train.max_steps,
            "lr": base.train.lr,
            "rounds": rounds,
        },
        "sides": {
            side: {
                "examples_per_second": spread([examples / each for each in seconds[side]]),
                "seconds": seconds[side],
                "rss": spread([each["rss"] for each in measured[side]]),
            }
            for side in SIDES
        },
        "ratios": {"together/apart": speedup(seconds["together"], seconds["apart"])},
        "weights_apart": differences,
        **environment(),
    }


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


def _run_side(side: str, configs: Sequence[RunConfig]) -> dict[str, Any]:
    job = {"side": side, "configs": [config.to_dict() for config in configs]}
    with ChildProcesses(grace=10.0) as children:
        child = ChildProcess(children, side, json.dumps(job), sys.executable, "-m", MODULE)
        with closing(child):
            return child.finish()


def _weight_difference(folder: Path, name: str) -> dict[str, float]:
    """The largest difference between the weights of a run on both sides, and the largest weight."""
    one, other = (load_file(folder / f"{side}0" / name / "adapter" / WEIGHTS_FILE) for side in SIDES)
    return {
        "difference": max(float((one[key] - other[key]).abs().max()) for key in one),
        "largest": max(float(tensor.abs().max()) for tensor in other.values()),
    }


def run(channel: Channel) -> None:
    """Runs one side in this process."""
    job = json.loads(channel.receive())
    configs = [RunConfig.from_dict(config) for config in job["configs"]]
    rows: dict[str, Any] = {}
    for config in configs:
        task = get_task(config.task.name)
        if task.name not in rows:
            splits = task.load(config.task.data_dir, task.splits)
            first = {split: part.select(range(min(VALIDATION_ROWS, len(part)))) for split, part in splits.items()}
            rows[task.name] = first | {task.train_split: splits[task.train_split]}
    start = time.perf_counter()
    try:
        if job["side"] == "together":
            for result in train_together(configs, rows=rows):
                if isinstance(result, UserError):
                    raise result
        else:
            for config in configs:
                train(config, rows=rows[config.task.name])
    except UserError as error:
        channel.send(error=str(error))
    else:
        channel.send(done={"seconds": time.perf_counter() - start, "rss": peak_rss()})


if __name__ == "__main__":
    run(Channel.standard())
