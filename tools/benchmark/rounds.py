"""Runs the sides of a comparison in turns, so that load on the machine affects all of them alike."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lora_hf.core.child_process import ChildProcesses
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.lora.precision import resolve_precision
from tools.benchmark.job import Job
from tools.benchmark.worker_process import WorkerProcess

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """The messages of a side: `ready` before the first round, one per counted round, `done` after the last."""

    ready: dict[str, Any]
    rounds: list[dict[str, Any]]
    done: dict[str, Any]

    @property
    def seconds(self) -> list[float]:
        return [each["seconds"] for each in self.rounds]


class Side(Protocol):
    def run_round(self) -> dict[str, Any]: ...


def measure(jobs: Mapping[str, Job]) -> dict[str, Measured]:
    """Runs each job in a process of its own, the first round as a warm-up that is not counted.

    Raises:
        ConfigError: a side rejects the config.
        TrainingError: the process of a side ended early.
    """
    with ChildProcesses(grace=10.0) as children, ExitStack() as stack:
        workers: dict[str, WorkerProcess] = {}
        for name, job in jobs.items():
            logger.info("benchmark: building %s", name)
            workers[name] = WorkerProcess(children, job)
            stack.callback(workers[name].close)
        rounds = run_rounds(workers, min(job.rounds for job in jobs.values()) - 1)
        return {name: Measured(worker.ready, rounds[name], worker.finish()) for name, worker in workers.items()}


def run_rounds(sides: Mapping[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Runs a warm-up and `rounds` rounds of every side, one side at a time, and returns the counted rounds.

    Each round starts with another side, so that no side always follows the same one.
    """
    names = list(sides)
    counted: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = sides[name].run_round()
            if number:
                counted[name].append(result)
            if "seconds" in result:
                logger.info("benchmark: round %d of %d, %s: %.2f s", number, rounds, name, result["seconds"])
    return counted


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median over rounds, the lowest and the highest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speedup(seconds: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as fast as `other`. Each ratio is taken within a round, where both met the same load."""
    return spread([theirs / ours for ours, theirs in zip(seconds, other, strict=True)])


def with_resolved_precision(config: RunConfig) -> RunConfig:
    """Replaces `model.precision=auto` by what it means on this machine, so that the record names it."""
    return replace(config, model=replace(config.model, precision=resolve_precision(config.model.precision)))


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The entries of a record that say on what it was measured, with the versions of `packages` of other projects."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    threads = {"threads": torch.get_num_threads(), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default")}
    return {
        "machine": machine() | threads | gpu,
        "versions": versions() | {package: importlib.metadata.version(package) for package in packages},
        "git": git_state(),
    }
