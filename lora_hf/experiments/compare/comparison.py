"""Everything a report says, computed once and kept in one record."""

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
from lora_hf.core.records import ComparisonRecord, describe_base
from lora_hf.experiments.compare.configurations import Configuration, configurations
from lora_hf.experiments.compare.disagreements import disagreements, written
from lora_hf.experiments.compare.measures import (
    best_evaluation,
    curves,
    memory_parts,
    pareto,
    peak_memory,
    spread,
    time_to,
)
from lora_hf.experiments.compare.runs import FinishedRun, find_runs
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

Draws = dict[tuple[str, str], np.ndarray]  # by split and metric the (resamples,) means over a configuration's runs


@dataclass(frozen=True)
class CompareOptions:
    """What a person asked for: a quality to time, a price for an hour of the machine, where the rows' texts lie."""

    quality: float | None = None
    price_per_hour: float | None = None
    currency: str | None = None
    data_dir: str | None = None


def compare(places: Sequence[Path], options: CompareOptions) -> ComparisonRecord:
    """The runs in these folders, task by task.

    Raises:
        DataError: no run can be used.
    """
    runs, left_out = find_runs(places)
    tasks, listed = [], []
    for _, members in groupby(runs, key=lambda run: run.task.name):
        found = configurations(list(members))
        tasks.append(_task(found, options))
        listed += [
            {
                "folder": str(run.folder),
                "task": run.task.name,
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
        runs=listed,
        left_out=[asdict(each) for each in left_out],
        tasks=tasks,
        statistics={"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED},
        options=asdict(options),
        versions=versions(),
        git=git_state(),
    )


def _task(found: Sequence[Configuration], options: CompareOptions) -> dict[str, Any]:
    first = next(each for each in found if each.same_data).runs[0]
    task = first.task
    runs = [run for each in found for run in each.runs]
    quality = options.quality
    if quality is None:
        quality = (min if task.greater_is_better else max)(best_evaluation(run) for run in runs)
    draws = _resampled(found)
    tests = _tests(found, draws)
    rows = [_configuration(each, draws.get(each.key), quality, options.price_per_hour) for each in found]
    _mark_fronts(rows, found)
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
        "disagreements": _disagreements(found, options.data_dir),
        "written": _written(found),
    }


def _configuration(each: Configuration, draws: Draws | None, quality: float, price: float | None) -> dict[str, Any]:
    records = [run.record for run in each.runs]
    first = records[0]
    times = [time_to(run, quality) for run in each.runs]
    reached = [seconds for seconds in times if seconds is not None]
    scores = {
        split: {
            name: {
                **spread([record.metrics[split][name] for record in records]),
                "interval": interval(draws[split, name]) if draws and (split, name) in draws else None,
            }
            for name in first.metrics[split]
        }
        for split in each.runs[0].task.evaluation_splits
    }
    training = [record.timings["train"] for record in records]
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
        "scores": scores,
        "parameters": first.parameters,
        "examples_per_second": spread([record.throughput["samples"] for record in records]),
        "peak_memory": max(peak_memory(record) for record in records),
        "memory_parts": memory_parts(max(records, key=peak_memory)),
        "checkpoint": sum(first.files.values()),
        "train_seconds": spread(training),
        "time_to_quality": {"reached": len(reached), "seconds": spread(reached)["mean"] if reached else None},
        "together": first.together,
        "cost": None if price is None else _cost([time / first.together for time in training], price),
        "curves": [curves(run) for run in each.runs],
        "middle": str(each.middle.folder),
        "confusion": _confusion(each.middle),
        "text_scores": [
            {"seed": run.record.seed, "name": texts.name, "inputs": len(texts.texts), "metrics": texts.record.metrics}
            for run in each.runs
            for texts in run.texts
        ],
        "warnings": sorted({warning for record in records for warning in record.warnings}),
    }


def _cost(seconds: Sequence[float], price_per_hour: float) -> dict[str, float]:
    """Of a run in the mean, and of all runs."""
    whole = sum(seconds) / 3600 * price_per_hour
    return {"mean": whole / len(seconds), "all": whole}


def _resampled(found: Sequence[Configuration]) -> dict[str, Draws]:
    """By configuration the resampled scores, drawn together for those that were scored on the same rows.

    A configuration has none where predictions of one of its runs are missing.
    """
    whole = [each for each in found if all(run.answers.keys() == set(run.task.evaluation_splits) for run in each.runs)]
    return {
        key: draws
        for data in {json.dumps(each.aspects["data"]) for each in whole}
        for key, draws in _drawn([each for each in whole if json.dumps(each.aspects["data"]) == data]).items()
    }


def _drawn(found: Sequence[Configuration]) -> dict[str, Draws]:
    draws: dict[str, Draws] = {each.key: {} for each in found}
    runs = [run for each in found for run in each.runs]
    for split in runs[0].task.evaluation_splits:
        predictions = np.stack([run.answers[split].predictions for run in runs])
        values = bootstrap(list(runs[0].record.metrics[split]), runs[0].answers[split].labels, predictions)
        at = 0
        for each in found:
            for name, resampled in values.items():
                draws[each.key][split, name] = resampled[:, at : at + len(each.runs)].mean(axis=1)
            at += len(each.runs)
    return draws


def _tests(found: Sequence[Configuration], draws: dict[str, Draws]) -> list[dict[str, Any]]:
    """Each pair of configurations with the same data: the difference of means, and McNemar's test of middle runs."""
    tests = []
    for first, second in combinations([each for each in found if each.key in draws], 2):
        if first.aspects["data"] != second.aspects["data"]:
            continue
        run, other = first.middle, second.middle
        metric = (run.split, run.task.best_metric)
        differences = draws[first.key][metric] - draws[second.key][metric]
        test = {
            "first": first.key,
            "second": second.key,
            "difference": first.score - second.score,
            "interval": interval(differences),
            "p": bootstrap_p(differences),
        }
        if run.task.label_names:
            right = [each.answers[each.split].predictions == each.answers[each.split].labels for each in (run, other)]
            test["mcnemar"] = asdict(mcnemar(*right))
        tests.append(test)
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["holm"] = corrected
    exact = [test["mcnemar"] for test in tests if "mcnemar" in test]
    for test, corrected in zip(exact, holm([test["p"] for test in exact]), strict=True):
        test["holm"] = corrected
    return tests


def _mark_fronts(rows: list[dict[str, Any]], found: Sequence[Configuration]) -> None:
    """Says of each configuration whether it is on the Pareto fronts; one that is not comparable is on none."""
    for name, costs, chosen in (
        ("front_parameters", [row["parameters"]["trainable"] for row in rows], [each.same_data for each in found]),
        ("front_time", [row["train_seconds"]["mean"] for row in rows], [each.comparable for each in found]),
    ):
        places = [place for place, taken in enumerate(chosen) if taken]
        greater = found[0].runs[0].task.greater_is_better
        on_front = pareto([costs[p] for p in places], [found[p].score for p in places], greater)
        for row in rows:
            row[name] = False
        for place, on in zip(places, on_front, strict=True):
            rows[place][name] = on


def _confusion(run: FinishedRun) -> list[list[int]] | None:
    """How often each class (row) got each answer (column)."""
    answers, classes = run.answers.get(run.split), len(run.task.label_names)
    if answers is None or not classes:
        return None
    cells = answers.labels.astype(int) * classes + answers.predictions.astype(int)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).tolist()


def _side(each: Configuration, run: FinishedRun) -> dict[str, Any]:
    return {"key": each.key, "label": each.label, "seed": run.record.seed, "folder": str(run.folder)}


def _disagreements(found: Sequence[Configuration], data_dir: str | None) -> dict[str, Any] | None:
    """Of the middle runs of the two best configurations; of the two first runs where there is one configuration."""
    able = [each for each in found if each.same_data]
    candidates = [(each, each.middle) for each in able] if len(able) > 1 else [(able[0], run) for run in able[0].runs]
    candidates = [(each, run) for each, run in candidates if run.split in run.answers][:2]
    if len(candidates) < 2:
        return None
    (_, first), (_, second) = candidates
    return {"between": [_side(*side) for side in candidates], **disagreements(first, second, data_dir)}


def _written(found: Sequence[Configuration]) -> list[dict[str, Any]]:
    """The texts of the two best configurations, for each split that both wrote texts for."""
    shown = []
    names = dict.fromkeys(texts.name for each in found for run in each.runs for texts in run.texts)
    for name in names:
        candidates = [
            (each, run, texts.texts)
            for each in found
            for run in each.runs[:1]
            for texts in run.texts
            if texts.name == name
        ][:2]
        if len(candidates) < 2:
            continue
        (each, run, first), (other, other_run, second) = candidates
        if [text.input for text in first] == [text.input for text in second]:
            between = [_side(each, run), _side(other, other_run)]
            shown.append({"name": name, "between": between, **written(first, second)})
    return shown
