"""Kills runs at random moments, resumes them, and compares the results with an uninterrupted run.

`python -m tests.support.kills --kills 20 --output kills.json` writes the record. Each run is a process that is killed
by SIGKILL and resumed with `resume="auto"`. The base, the data and the recipe are bundled in the package.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE, RunRecord
from lora_hf.data.tasks.registry import get_task
from lora_hf.training import checkpoints
from lora_hf.training.checkpoints import MANIFEST_FILE, STATE_FILE, checkpoints_in, newest_valid
from lora_hf.training.run import Run, train
from tests.support import fork_server
from tests.support.waiting import wait_until

ROWS = {"train": 64, "validation": 20}
# A checkpoint every other step, so that kills hit between checkpoints, within epochs and while one is written.
EVERY = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 1}
POLL = 0.001  # seconds between two looks at a run that is to be killed at a certain step


def small_config(folder: Path, **train: Any) -> RunConfig:
    """A run of a few seconds, with dropout, so that a random generator that is not restored changes the result."""
    return RunConfig.from_dict(
        {
            "model": {"name": "tiny-roberta", "precision": "fp32"},
            "task": {"name": "rule-sentiment", "max_length": 64},
            "lora": {"r": 4, "lora_dropout": 0.1, "targets": ["attention"]},
            "train": {"epochs": 2, "batch_size": 8, "lr": 1e-3, "hf": EVERY, **train},
            "output": {"dir": str(folder), "plots": False, "name": "run"},
        }
    )


def small_rows() -> dict[str, Dataset]:
    """The first rows of the bundled task."""
    return {split: rows.select(range(ROWS[split])) for split, rows in _task_rows().items()}


def _task_rows() -> Mapping[str, Dataset]:
    task = get_task("rule-sentiment")
    return task.load(None, task.splits)


def differences(uninterrupted: Run, folder: Path) -> list[str]:
    """The parts of a run folder that differ from those of an uninterrupted run, apart from times and paths.

    Bit for bit: the adapter, the weights, optimizer, schedule and generators of the last checkpoint, the metrics, the
    predictions and the log.
    """
    last = checkpoints_in(uninterrupted.folder / "checkpoints")[0]
    files = [*uninterrupted.weights.iterdir(), *uninterrupted.folder.glob("predictions-*.jsonl"), *last.iterdir()]
    paths = [
        path.relative_to(uninterrupted.folder)
        for path in sorted(files)
        if path.name not in (STATE_FILE, MANIFEST_FILE, RUN_CONFIG_FILE)  # the last holds the folder's own path
    ]
    found = [
        str(path)
        for path in paths
        if not (folder / path).is_file() or not _equal(_content(folder / path), _content(uninterrupted.folder / path))
    ]
    record = RunRecord.load(folder / "record.json")
    if record.metrics != uninterrupted.record.metrics:
        found.append("metrics")
    if record.best != uninterrupted.record.best:
        found.append("best")
    if _untimed(record) != _untimed(uninterrupted.record):
        found.append("history")
    return found


def _content(file: Path) -> Any:
    """The content of a file, because safetensors and torch may write equal values as different bytes."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth"):
        with safe_globals():
            content = torch.load(file, weights_only=True)
        # Not the generator of Python: importing `rich` draws from it, and training does not.
        return {key: value for key, value in content.items() if key != "python"}
    return file.read_bytes()


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def _untimed(record: RunRecord) -> list[dict[str, float]]:
    timed = ("_runtime", "_per_second", "train_loss")  # the last is a mean over the steps of this process only
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in record.history]


def kill_once(
    config: RunConfig, when: Callable[[Path], object] = lambda _: False, die_in: tuple[str, bool] | None = None
) -> dict[str, Any]:
    """Starts the run on `small_rows`, kills it once `when(run folder)` is true, and returns its progress.

    With `die_in`, the arguments of `die_while_writing`, the run kills itself.
    """
    folder = Path(config.output.dir) / str(config.output.name)
    child = fork_server.start(run_child, config.to_dict(), die_in)
    try:
        wait_until(lambda: not child.is_alive() or (folder / RUN_CONFIG_FILE).exists(), POLL)
        start = time.monotonic()
        wait_until(lambda: not child.is_alive() or when(folder), POLL)
    finally:
        child.kill()
        child.join()
    seconds = time.monotonic() - start
    checkpoint = newest_valid(folder / "checkpoints")
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return {
        "killed": child.exitcode == -signal.SIGKILL and not (folder / RECORD_FILE).exists(),
        "seconds": seconds,
        "logged_steps": len({json.loads(line)["step"] for line in lines if line.endswith("}")}),
        "checkpoint": checkpoint.name if checkpoint else None,
        "while_writing": any(not (each / MANIFEST_FILE).exists() for each in checkpoints_in(folder / "checkpoints")),
    }


def run_child(config: dict[str, Any], die_in: tuple[str, bool] | None) -> None:
    """The run that `kill_once` starts."""
    if die_in:
        die_while_writing(*die_in)
    train(RunConfig.from_dict(config), rows=small_rows())


def die_while_writing(name: str, complete: bool) -> None:
    """Kills this process when all files of a checkpoint but the manifest are on the disk, or when all are."""
    flush = checkpoints._flush

    def flush_and_die(path: Path) -> None:
        flush(path)
        checkpoint = path if path.is_dir() else path.parent
        if checkpoint.name == name and (path == checkpoint if complete else path.suffix == ".part"):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints._flush = flush_and_die


def random_kills(count: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kills `count` runs, each at a random moment, resumes them and compares the results."""
    rows, draws = small_rows(), random.Random(seed)
    start = time.monotonic()
    uninterrupted = train(small_config(folder / "whole"), rows=rows)
    length = time.monotonic() - start
    kills = []
    while len(kills) < count:
        config = small_config(folder / f"kill-{draws.random()}")
        delay = draws.uniform(0.05, 1.0) * length
        begun: list[float] = []

        def is_over(_: Path, delay: float = delay, begun: list[float] = begun) -> bool:
            begun.append(time.monotonic())
            return begun[-1] - begun[0] >= delay

        kill = kill_once(config, is_over)
        if not kill.pop("killed"):
            continue  # the run ended before
        kills.append(kill | {"differences": differences(uninterrupted, train(config, "auto", rows).folder)})
    return {
        "kind": "random kills",
        "run_seconds": length,
        "exact": sum(not kill["differences"] for kill in kills),
        "kills": kills,
        "config": replace(small_config(folder), output=RunConfig().output).to_dict(),
        "seed": seed,
        "versions": versions(),
        "git": git_state(),
        "machine": machine(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Writes the record. Returns 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = random_kills(options.kills, Path(folder), options.seed)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['exact']} of {options.kills} resumed bit for bit")
    return int(record["exact"] != options.kills)


if __name__ == "__main__":
    sys.exit(main())
