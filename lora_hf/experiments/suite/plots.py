"""The plots of a suite: scores by task, and the mean score by parameters and by time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.formatting import count
from lora_hf.core.records import SuiteRecord
from lora_hf.experiments.plots import draw_frontier, draw_majority, load_pyplot, pareto_frontier, save, series_style
from lora_hf.experiments.suite.tables import core_seconds, group_runs, mean_score, metric_label, shared_runs, task_means

COLUMNS = 4


def draw_suite(record: SuiteRecord, folder: Path) -> list[Path]:
    """Writes `scores.png`, `parameters.png` and `time.png` and returns their paths.

    The last two need a task that all configurations have finished.
    """
    paths = [_draw_scores(record, folder / "scores.png")]
    if by_name := shared_runs(record):
        parameters = [task_means(tasks, lambda run: run["parameters"]["trainable"]) for tasks in by_name.values()]
        times = [task_means(tasks, lambda run: core_seconds(run) / 60) for tasks in by_name.values()]
        for name, label, means in (
            ("parameters.png", "trainable parameters, mean over the tasks", parameters),
            ("time.png", "CPU minutes per run, mean over the tasks", times),
        ):
            paths.append(_draw_costs(record, list(map(statistics.fmean, means)), label, folder / name))
    return paths


def _draw_scores(record: SuiteRecord, path: Path) -> Path:
    names, groups = list(record.configurations), group_runs(record)
    tasks = list(dict.fromkeys(task for task, *_ in groups))
    columns, lines = min(COLUMNS, len(tasks)), -(-len(tasks) // COLUMNS)
    size = (3.3 * columns, 3.2 * lines + 0.8)
    figure, grid = load_pyplot().subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    axes_by_task = dict(zip(tasks, grid.flat, strict=False))
    handles: dict[str, Any] = dict.fromkeys([*names, "majority class"])
    for task, name, runs in groups:
        axes, x = axes_by_task[task], names.index(name)
        values = [100 * run["value"] for run in runs]
        mean = statistics.fmean(values)
        bars = [[mean - min(values)], [max(values) - mean]] if len(values) > 1 else None
        style = series_style(x) | {"linestyle": "none", "markersize": 8, "capsize": 4}
        handles[name] = axes.errorbar([x], [mean], yerr=bars, **style)
        if runs[0]["majority_value"] is not None:
            handles["majority class"] = draw_majority(axes, 100 * runs[0]["majority_value"])
        axes.set(
            title=f"{task} ({count(len(values), 'seed')})", ylabel=f"{metric_label(runs[0]['metric'])}, %", xticks=[]
        )
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", alpha=0.3)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    shown = {name: handle for name, handle in handles.items() if handle is not None}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
    figure.suptitle(f"{record.base['name']}: mean over the seeds, with their range")
    return save(figure, path)


def _draw_costs(record: SuiteRecord, costs: Sequence[float], label: str, path: Path) -> Path:
    by_name, names = shared_runs(record), list(record.configurations)
    scores = [100 * mean_score(tasks) for tasks in by_name.values()]
    figure, axes = load_pyplot().subplots(figsize=(6.5, 4.2), layout="constrained")
    for name, cost, score in zip(by_name, costs, scores, strict=True):
        style = series_style(names.index(name)) | {"linestyle": "none", "markersize": 9}
        axes.plot(cost, score, **style, label=name, zorder=3)
    on_frontier = pareto_frontier(costs, scores)
    draw_frontier(axes, [point for point, on in zip(zip(costs, scores, strict=True), on_frontier, strict=True) if on])
    if max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    tasks = count(len(next(iter(by_name.values()))), "task")
    axes.set(xlabel=label, ylabel=f"mean score of {tasks}, %", title=record.base["name"])
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path)
