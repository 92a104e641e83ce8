"""Renders the results of a suite as Markdown tables, from its record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_hf.core.formatting import count, minutes, percent, table
from lora_hf.core.records import SuiteRecord, peak_memory
from lora_hf.data.tasks import glue

GLUE = tuple(task.name for task in glue.GLUE)
Run = dict[str, Any]
ByTask = Mapping[str, Sequence[Run]]  # the runs of one configuration, in the order of the plan
Measure = Callable[[Run], float]


def scores(record: SuiteRecord) -> str:
    """The score of each task and configuration over its seeds, and the gap to the published score."""
    rows = []
    for task, name, runs in group_runs(record):
        values = [run["value"] for run in runs]
        majority, published = runs[0]["majority_value"], record.published[task][name]
        rows.append(
            [
                f"{task}, {metric_label(runs[0]['metric'])}",
                name,
                percent(statistics.fmean(values)),
                f"{percent(min(values))} to {percent(max(values))}" if len(values) > 1 else "-",
                str(len(values)),
                "-" if majority is None else percent(majority),
                published.get("why_not")
                or f"{published['gap']:+.1f} ({published['score']:.1f}±{published['spread']:.1f})",
            ]
        )
    for name in record.configurations:
        average = glue_average(record, name)
        if average is not None:
            rows.append(["**GLUE average**", name, f"**{percent(average)}**", "-", "-", "-", "-"])
    head = ["task, metric", "configuration", "mean, %", "range, %", "seeds", "majority class, %", "gap to published"]
    return table(head, rows, text_columns=2)


def resources(record: SuiteRecord) -> str:
    """What a run of each task and configuration costs, as the mean over its seeds."""
    rows = [
        [
            task,
            name,
            f"{runs[0]['rows']['train']:,}",
            f"{runs[0]['parameters']['trainable']:,}",
            minutes(_mean(runs, lambda run: run["timings"]["train"])),
            minutes(_mean(runs, seconds)),
            f"{_mean(runs, lambda run: run['throughput']['samples']):,.0f}",
            _megabytes(_mean(runs, _peak_memory)),
            _megabytes(_mean(runs, file_bytes), 2),
        ]
        for task, name, runs in group_runs(record)
    ]
    head = ["task", "configuration", "training rows", "trainable parameters", "training", "whole run", "examples/s"]
    return table([*head, "peak memory, MB", "file, MB"], rows, text_columns=2)


def storage(record: SuiteRecord) -> str:
    """File sizes for all tasks: one base with an adapter per task, compared with one full model per task."""
    base = record.base["bytes"]
    full_runs: dict[str, list[Run]] = {}
    for run in record.runs:
        if run["method"] == "full":
            full_runs.setdefault(run["task"], []).append(run)
    rows = []
    for name in record.configurations:
        tasks = runs_by_task(record, name)
        if any(runs[0]["method"] != "full" for runs in tasks.values()):
            measured = tasks.keys() <= full_runs.keys()
            copies = None if base is None else len(tasks) * base
            full = sum(task_means({task: full_runs[task] for task in tasks}, file_bytes)) if measured else copies
            adapters = sum(task_means(tasks, file_bytes))
            together = None if base is None else base + adapters
            rows.append(
                [
                    name,
                    str(len(tasks)),
                    _megabytes(base, 1),
                    _megabytes(adapters, 2),
                    _megabytes(together, 1),
                    _megabytes(full, 1) + ("" if measured or full is None else " (copies of the base)"),
                    f"{full / together:.1f}x" if full and together else "-",
                ]
            )
    head = ["configuration", "tasks", "one base, MB", "all adapters, MB", "total, MB", "full models, MB", "smaller"]
    return table(head, rows)


def texts(record: SuiteRecord) -> str:
    """All scores of the generated texts by task, subset and configuration, as the mean over the seeds."""
    groups = [(task, name, runs) for task, name, runs in group_runs(record) if "texts" in runs[0]]
    metrics = list(dict.fromkeys(metric for *_, runs in groups for metric in runs[0]["texts"]["metrics"]["all"]))
    rows = []
    for task, name, runs in groups:
        for subset in runs[0]["texts"]["metrics"]:
            found = [[run["texts"]["metrics"][subset].get(metric) for run in runs] for metric in metrics]
            cells = ["-" if None in values else f"{statistics.fmean(values):.4f}" for values in found]
            rows.append([task if subset == "all" else f"{task}, {subset}", name, *cells])
    return table(["task", "configuration", *metrics], rows, text_columns=2)


def choice(record: SuiteRecord) -> str:
    """Scores and costs of each configuration, over the tasks that all of them have finished."""
    shared = shared_runs(record)
    rows = []
    for name, tasks in shared.items():
        runs = [run for group in tasks.values() for run in group]
        rows.append(
            [
                name,
                percent(mean_score(tasks)),
                f"{statistics.median(run['parameters']['trainable'] for run in runs):,.0f}",
                f"{sum(task_means(tasks, seconds)) / 3600:.2f}",
                f"{sum(task_means(tasks, core_seconds)) / 3600:.2f}",
                _megabytes(max(map(_peak_memory, runs))),
                _megabytes(sum(task_means(tasks, file_bytes)), 2),
            ]
        )
    common = count(max(map(len, shared.values()), default=0), "task")
    head = ["configuration", f"mean score of {common}, %", "trainable parameters", "hours", "core-hours"]
    return table([*head, "peak memory, MB", "files, MB"], rows)


def runs_by_task(record: SuiteRecord, configuration: str) -> ByTask:
    """The finished runs of a configuration."""
    found: dict[str, list[Run]] = {task: [] for tasks in record.configurations.values() for task in tasks}
    for run in record.runs:
        if run["configuration"] == configuration:
            found[run["task"]].append(run)
    return {task: runs for task, runs in found.items() if runs}


def group_runs(record: SuiteRecord) -> list[tuple[str, str, Sequence[Run]]]:
    """The finished runs by task and configuration, in the order of the plan."""
    found = {name: runs_by_task(record, name) for name in record.configurations}
    tasks = dict.fromkeys(task for tasks in record.configurations.values() for task in tasks)
    return [(task, name, found[name][task]) for task in tasks for name in found if task in found[name]]


def shared_runs(record: SuiteRecord) -> dict[str, ByTask]:
    """The runs of each started configuration, of the tasks that all of these have finished."""
    started = {name: tasks for name in record.configurations if (tasks := runs_by_task(record, name))}
    shared = set.intersection(*(set(tasks) for tasks in started.values())) if started else set()
    return {name: {task: tasks[task] for task in tasks if task in shared} for name, tasks in started.items() if shared}


def task_means(tasks: ByTask, measure: Measure) -> list[float]:
    """The mean over the seeds of each task, so that tasks with more seeds have no more weight."""
    return [_mean(runs, measure) for runs in tasks.values()]


def mean_score(tasks: ByTask) -> float:
    return statistics.fmean(task_means(tasks, lambda run: run["value"]))


def glue_average(record: SuiteRecord, configuration: str) -> float | None:
    """The mean score of the eight GLUE tasks, or None if one is missing."""
    tasks = {task: runs for task, runs in runs_by_task(record, configuration).items() if task in GLUE}
    return mean_score(tasks) if len(tasks) == len(GLUE) else None


def metric_label(metric: str) -> str:
    return metric.replace("_correlation", "").replace("_", " ")


def seconds(run: Run) -> float:
    """The time of the run, with generating and scoring texts."""
    return run["timings"]["total"] + _text_seconds(run)


def core_seconds(run: Run) -> float:
    """The CPU time of the run, which other programs on the machine do not change; of texts, the time of all threads."""
    threads, timings = run["threads"] or 1, run["timings"]
    return timings.get("cpu", timings["total"] * threads) + _text_seconds(run) * threads  # older records lack `cpu`


def _text_seconds(run: Run) -> float:
    return sum(run.get("texts", {}).get("timings", {}).values())


def file_bytes(run: Run) -> int:
    return sum(run["files"].values())


def _peak_memory(run: Run) -> int:
    return peak_memory(run["memory"])


def _mean(runs: Sequence[Run], measure: Measure) -> float:
    return statistics.fmean(map(measure, runs))


def _megabytes(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value / 1e6:,.{digits}f}"
