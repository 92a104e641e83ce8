"""Compares finished runs: computes everything the report shows and keeps it in one record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from lora_hf.core.provenance import git_state, versions
from lora_hf.core.records import ComparisonRecord, describe_base, peak_memory
from lora_hf.experiments.compare.configurations import Configuration, group_runs
from lora_hf.experiments.compare.disagreements import find_different_texts, find_disagreements
from lora_hf.experiments.compare.runs import FinishedRun, find_runs, memory_parts
from lora_hf.experiments.compare.statistics import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    bootstrap,
    bootstrap_p,
    holm,
    interval,
    mcnemar,
)
from lora_hf.experiments.plots import pareto_frontier

Samples = dict[tuple[str, str], np.ndarray]  # by split and metric: (resamples,) means over a configuration's runs


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    `quality` is the score for which the time to reach it is reported, by default the best that every run reaches.
    """

    quality: float | None = None
    price_per_hour: float | None = None
    currency: str | None = None
    data_dir: str | None = None  # of the texts of rows; by default the one that the runs used


def compare(paths: Sequence[Path], options: CompareOptions) -> ComparisonRecord:
    """Compares the runs in these folders, task by task.

    Args:
        paths: run folders, or folders that contain run folders.

    Raises:
        DataError: no run can be used.
    """
    runs, left_out = find_runs(paths)
    tasks, entries = [], []
    for task, members in groupby(runs, key=lambda run: run.task.name):
        found = group_runs(list(members))
        tasks.append(_compare_task(found, options))
        entries += [
            {
                "folder": str(run.folder),
                "task": task,
                "configuration": each.key,
                "seed": run.record.seed,
                "score": run.score,
                "started": run.record.started,
            }
            for each in found
            for run in each.runs
        ]
    return ComparisonRecord(
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        runs=entries,
        left_out=left_out,
        tasks=tasks,
        statistics={"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED},
        options=asdict(options),
        versions=versions(),
        git=git_state(),
    )


def _compare_task(found: Sequence[Configuration], options: CompareOptions) -> dict[str, Any]:
    first = next(each for each in found if each.same_data).runs[0]
    task = first.task
    runs = [run for each in found for run in each.runs]
    quality = options.quality
    if quality is None:
        quality = (min if task.greater_is_better else max)(run.best_evaluation for run in runs)
    samples = _resample(found)
    tests = _test_pairs(found, samples)
    rows = [_summarize(each, samples.get(each.key), quality, options.price_per_hour) for each in found]
    _mark_frontiers(rows, found)
    bases = {describe_base(run.record) for run in runs}
    return {
        "task": task.name,
        "base": bases.pop() if len(bases) == 1 else None,
        "split": first.split,
        "metric": task.best_metric,
        "greater_is_better": task.greater_is_better,
        "label_names": list(task.label_names),
        "majority": first.record.majority,
        "rows": first.record.rows,
        "quality": quality,
        "runs": len(runs),
        "configurations": rows,
        "pairs": len(tests),
        "tests": tests,
        "disagreements": find_disagreements(found, options.data_dir),
        "written": find_different_texts(found),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def _summarize(each: Configuration, samples: Samples | None, quality: float, price: float | None) -> dict[str, Any]:
    records = [run.record for run in each.runs]
    first = records[0]
    reached = [seconds for run in each.runs if (seconds := run.time_to(quality)) is not None]
    training = [record.timings["train"] for record in records]
    total_cost = sum(training) / 3600 * (price or 0)
    return {
        "key": each.key,
        "label": each.label,
        "method": first.method,
        "model": first.model,
        "runs": len(records),
        "seeds": [record.seed for record in records],
        "comparable": each.comparable,
        "same_data": each.same_data,
        "differs": each.differs,
        "machine": each.aspects["machine"],
        "recipe": each.aspects["recipe"],
        "scores": {
            split: {
                name: {
                    **spread([record.metrics[split][name] for record in records]),
                    "interval": interval(samples[split, name]) if samples and (split, name) in samples else None,
                }
                for name in first.metrics[split]
            }
            for split in each.runs[0].task.evaluation_splits
        },
        "parameters": first.parameters,
        "examples_per_second": spread([record.throughput["samples"] for record in records]),
        "peak_memory": max(peak_memory(record.memory) for record in records),
        "memory_parts": memory_parts(max(records, key=lambda record: peak_memory(record.memory))),
        "checkpoint": sum(first.files.values()),
        "train_seconds": spread(training),
        "time_to_quality": {"reached": len(reached), "seconds": spread(reached)["mean"] if reached else None},
        "cost": None if price is None else {"mean": total_cost / len(records), "all": total_cost},
        "curves": [run.curves for run in each.runs],
        "middle": str(each.median_run.folder),
        "confusion": _confusion(each.median_run),
        "evaluation": each.median_run.record.evaluation.get(each.runs[0].split, {}),
        "text_scores": [
            {"seed": run.record.seed, "name": texts.name, "inputs": len(texts.texts), "metrics": texts.record.metrics}
            for run in each.runs
            for texts in run.texts
        ],
        "warnings": sorted({warning for record in records for warning in record.warnings}),
    }


def _resample(found: Sequence[Configuration]) -> dict[str, Samples]:
    """Bootstrap samples of the scores by configuration; those with the same data share the resampled rows.

    Configurations without predictions of every run have none.
    """
    groups: dict[str, list[Configuration]] = {}
    for each in found:
        if all(run.predictions.keys() == set(run.task.evaluation_splits) for run in each.runs):
            groups.setdefault(json.dumps(each.aspects["data"]), []).append(each)
    samples: dict[str, Samples] = {}
    for group in groups.values():
        runs = [run for each in group for run in each.runs]
        keys = np.array([each.key for each in group for _ in each.runs])
        for split in runs[0].task.evaluation_splits:
            predicted = np.stack([run.predictions[split].predicted for run in runs])
            values = bootstrap(list(runs[0].record.metrics[split]), runs[0].predictions[split].labels, predicted)
            for each in group:
                means = {(split, name): values[name][:, keys == each.key].mean(axis=1) for name in values}
                samples.setdefault(each.key, {}).update(means)
    return samples


def _test_pairs(found: Sequence[Configuration], samples: dict[str, Samples]) -> list[dict[str, Any]]:
    """Tests each pair with the same data: the difference of means, and McNemar's test on the median runs."""
    tests = []
    for first, second in combinations([each for each in found if each.key in samples], 2):
        if first.aspects["data"] != second.aspects["data"]:
            continue
        run = first.median_run
        metric = (run.split, run.task.best_metric)
        differences = samples[first.key][metric] - samples[second.key][metric]
        test = {
            "first": first.key,
            "second": second.key,
            "difference": first.score - second.score,
            "interval": interval(differences),
            "p": bootstrap_p(differences),
        }
        if run.task.label_names:
            sides = [each.median_run.predictions[run.split] for each in (first, second)]
            test["mcnemar"] = mcnemar(*(side.predicted == side.labels for side in sides))
        tests.append(test)
    for group in (tests, [test["mcnemar"] for test in tests if "mcnemar" in test]):
        for test, corrected in zip(group, holm([test["p"] for test in group]), strict=True):
            test["holm"] = corrected
    return tests


def _mark_frontiers(rows: list[dict[str, Any]], found: Sequence[Configuration]) -> None:
    """Marks the rows on each Pareto frontier; only comparable configurations can be on one."""
    scores, greater_is_better = [each.score for each in found], found[0].runs[0].task.greater_is_better
    for name, costs, eligible in (
        ("front_parameters", [row["parameters"]["trainable"] for row in rows], [each.same_data for each in found]),
        ("front_time", [row["train_seconds"]["mean"] for row in rows], [each.comparable for each in found]),
    ):
        for row, on_frontier in zip(rows, pareto_frontier(costs, scores, greater_is_better, eligible), strict=True):
            row[name] = on_frontier


def _confusion(run: FinishedRun) -> list[list[int]] | None:
    """The number of rows by label (row) and prediction (column)."""
    found, classes = run.predictions.get(run.split), len(run.task.label_names)
    if found is None or not classes:
        return None
    cells = found.labels.astype(int) * classes + found.predicted.astype(int)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).tolist()
