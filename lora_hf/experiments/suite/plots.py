"""The pictures of a suite: scores by task, and what a score costs in parameters and in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.records import SuiteRecord
from lora_hf.experiments.suite.tables import groups, mean_score, metric_words, seconds_of, shared_tasks

# Okabe and Ito's colours, which people with any colour vision tell apart; the markers tell them apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
COLUMNS = 4
Point = tuple[float, float]


def draw_suite(record: SuiteRecord, folder: Path) -> list[Path]:
    """Writes `scores.png`, `parameters.png` and `time.png`; the paths.

    The last two compare means over the tasks that all configurations have finished, and are left out without one.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = [_draw_scores(record, folder / "scores.png")]
    tasks = shared_tasks(record)
    if tasks:
        by_name = {
            name: [run for run in record.runs if run["configuration"] == name and run["task"] in tasks]
            for name in record.configurations
        }
        by_name = {name: runs for name, runs in by_name.items() if runs}
        words = f"mean score of {len(tasks)} task{'s' if len(tasks) > 1 else ''}, %"
        parameters = {
            name: _average(runs, lambda run: run["parameters"]["trainable"]) for name, runs in by_name.items()
        }
        times = {name: _average(runs, seconds_of) / 60 for name, runs in by_name.items()}
        quality = {name: 100 * mean_score(runs) for name, runs in by_name.items()}
        for file, title, costs in (
            ("parameters.png", "trained parameters, mean over the tasks", parameters),
            ("time.png", "minutes a run, mean over the tasks", times),
        ):
            written.append(_draw_costs(record, costs, quality, (title, words), folder / file))
    return written


def _average(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """The mean over tasks of the mean over seeds: a task with more seeds weighs no more."""
    by_task: dict[str, list[float]] = {}
    for run in runs:
        by_task.setdefault(run["task"], []).append(value(run))
    means = [sum(values) / len(values) for values in by_task.values()]
    return sum(means) / len(means)


def _draw_scores(record: SuiteRecord, path: Path) -> Path:
    from matplotlib import pyplot

    names = list(record.configurations)
    tasks = list(dict.fromkeys(task for task, *_ in groups(record)))
    lines = -(-len(tasks) // COLUMNS)
    figure, panels = pyplot.subplots(
        lines, min(COLUMNS, len(tasks)), figsize=(3.3 * min(COLUMNS, len(tasks)), 3.2 * lines + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    axes_of = dict(zip(tasks, panels.flat, strict=False))
    handles: dict[str, Any] = {}
    for task, name, runs in groups(record):
        axes, place = axes_of[task], names.index(name)
        values = [100 * run["value"] for run in runs]
        mean = sum(values) / len(values)
        spread = [[mean - min(values)], [max(values) - mean]] if len(values) > 1 else None
        handles[name] = axes.errorbar(
            [place], [mean], yerr=spread, color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)],
            markersize=8, capsize=4, linestyle="none",
        )  # fmt: skip
        if runs[0]["majority_value"] is not None:
            line = axes.axhline(100 * runs[0]["majority_value"], color="grey", linestyle=":")
            handles["always one answer"] = line
        seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
        axes.set(title=f"{task} ({seeds})", ylabel=f"{metric_words(runs[0])}, %", xticks=[])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", alpha=0.3)
    for axes in list(panels.flat)[len(tasks) :]:
        axes.set_visible(False)
    shown = {name: handles[name] for name in (*names, "always one answer") if name in handles}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
    figure.suptitle(f"{record.base['name']}: mean of the seeds, bars from lowest to highest")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_costs(
    record: SuiteRecord, costs: dict[str, float], quality: dict[str, float], words: tuple[str, str], path: Path
) -> Path:
    """A point a configuration, and the line of those that no other beats in both."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    for place, name in enumerate(record.configurations):
        if name in costs:
            axes.scatter(
                costs[name], quality[name], s=80, color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)], label=name, zorder=3,
            )  # fmt: skip
    front = pareto_front([(costs[name], quality[name]) for name in costs])
    axes.plot(*zip(*front, strict=True), color="grey", linestyle="--", zorder=2, label="Pareto front")
    if max(costs.values()) > 10 * min(costs.values()):
        axes.set_xscale("log")
    axes.set(xlabel=words[0], ylabel=words[1], title=record.base["name"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The (cost, quality) points that no other beats: none costs as little or less and is better."""
    front: list[Point] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front
