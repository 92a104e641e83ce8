"""Records of suites with round numbers, so that every cell of their tables can be computed by hand."""

from __future__ import annotations

from typing import Any

from lora_hf.core.records import SuiteRecord

METRICS = {"cola": "matthews_correlation", "stsb": "pearson"}


def suite_run(task: str, configuration: str, seed: int, value: float, **changed: Any) -> dict[str, Any]:
    """A finished run: 100 s with 4 threads, 50 MB of memory, a file of 1 MB."""
    return {
        "task": task,
        "configuration": configuration,
        "seed": seed,
        "folder": f"{task}-{configuration}-seed{seed}",
        "method": "lora",
        "metric": METRICS.get(task, "accuracy"),
        "value": value,
        "majority_value": 0.5,
        "rows": {"train": 2490, "validation": 277},
        "parameters": {"total": 5_000_000, "trainable": 90_000},
        "timings": {"train": 60.0, "total": 100.0},
        "throughput": {"samples": 1234.4},
        "memory": {"rss": 50_000_000, "cuda": 0},
        "threads": 4,
        "files": {"adapter": 1_000_000},
        **changed,
    }


def suite_record(runs: list[dict[str, Any]], **changed: Any) -> SuiteRecord:
    """The record of these runs on a base of 10 MB, without published scores."""
    names = dict.fromkeys(run["configuration"] for run in runs)
    values: dict[str, Any] = {
        "base": {"name": "tiny-roberta", "bytes": 10_000_000},
        "configurations": {name: {run["task"]: {} for run in runs if run["configuration"] == name} for name in names},
        "planned": len(runs),
        "jobs": 1,
        "started": "2026-01-01T00:00:00+00:00",
        "runs": runs,
        "published": {run["task"]: {name: {"why_not": "other base"} for name in names} for run in runs},
    }
    return SuiteRecord(**(values | changed))


def two_methods() -> SuiteRecord:
    """RTE with two seeds and SST-2 with one, each with LoRA and full fine-tuning."""
    full = {
        "method": "full",
        "files": {"model": 20_000_000},
        "parameters": {"total": 5_000_000, "trainable": 5_000_000},
    }
    slow = {"timings": {"train": 150.0, "total": 200.0}, "memory": {"rss": 90_000_000, "cuda": 0}}
    return suite_record(
        [
            suite_run("rte", "lora", 0, 0.5),
            suite_run("rte", "lora", 1, 0.6, timings={"train": 120.0, "total": 140.0}),
            suite_run("sst2", "lora", 0, 0.8),
            suite_run("rte", "full", 0, 0.6, **full, **slow),
            suite_run("rte", "full", 1, 0.7, **full, **slow),
            suite_run("sst2", "full", 0, 0.79, **full, **slow),
        ]
    )
