"""The plots of a comparison, drawn from its record: one of each kind per task."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_hf.experiments.compare.evaluation import draw_reliability
from lora_hf.experiments.plots import draw_frontier, draw_majority, load_pyplot, save, series_style
from lora_hf.training.evaluation_plots import draw_matrix, escape_formula

PART_COLORS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CCCCCC")
WIDTH = 9.0  # inches
TWO_COLUMN_LABEL = 55  # characters of the longest label in a legend with two columns
CONFUSIONS_PER_ROW = 4
CONFUSION_TITLE = 32  # characters per line


def draw_plots(task: dict[str, Any], folder: Path) -> dict[str, str]:
    """Writes the plots of one task of a `ComparisonRecord` and returns their file names by kind."""
    drawings: dict[str, Callable[[dict[str, Any]], Any]] = {
        "curves": _curves,
        "parameters": _parameters,
        "time": _time,
        "memory": _memory,
        "confusion": _confusion,
        "reliability": draw_reliability,
    }
    files = {}
    for kind, draw in drawings.items():
        figure = draw(task)
        if figure is not None:
            files[kind] = save(figure, folder / f"{task['task']}-{kind}.png").name
    return files


def _names(task: dict[str, Any]) -> list[str]:
    return [escape_formula(f"{row['key']}: {row['label']}") for row in task["configurations"]]


def _figure(task: dict[str, Any], columns: int = 1) -> tuple[Any, Any]:
    """Axes, with room for the legend below them."""
    names = _names(task)
    height = 4.4 + 0.2 * (len(names) / _legend_columns(names) + 2)
    return load_pyplot().subplots(1, columns, figsize=(WIDTH, height), layout="constrained")


def _add_legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = _legend_columns(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= TWO_COLUMN_LABEL else 1


def score_of(task: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The score of a configuration that the report compares: its mean, range and interval."""
    return row["scores"][task["split"]][task["metric"]]


def majority_of(task: dict[str, Any]) -> float | None:
    """The same score of always predicting the majority class."""
    return task["majority"].get(task["split"], {}).get(task["metric"])


def _score_label(task: dict[str, Any]) -> str:
    better = "" if task["greater_is_better"] else ", lower is better"
    return f"{task['metric'].replace('_', ' ')} ({task['split'].replace('_', ' ')}){better}"


def _add_majority(task: dict[str, Any], axes: Any) -> None:
    majority = majority_of(task)
    if majority is not None:
        draw_majority(axes, majority)


def _curves(task: dict[str, Any]) -> Any:
    figure, (left, right) = _figure(task, columns=2)
    for index, (name, row) in enumerate(zip(_names(task), task["configurations"], strict=True)):
        style = series_style(index)
        for curve in row["curves"]:
            if curve["loss"]:
                left.plot(*zip(*curve["loss"], strict=True), **style | {"marker": ""}, linewidth=1, alpha=0.8)
            if curve["score"]:
                right.plot(*zip(*curve["score"], strict=True), **style, markersize=5, linewidth=1.3, alpha=0.8)
        right.plot([], [], **style, label=name)
    _add_majority(task, right)
    left.set_ylabel("training loss")
    right.set_ylabel(_score_label(task))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    _add_legend(figure, right)
    figure.suptitle(f"{task['task']}: learning curves of all runs")
    return figure


def _scores_by_cost(task: dict[str, Any], cost: Callable[[dict[str, Any]], float], label: str, frontier: str) -> Any:
    """Scores with their intervals against a cost."""
    figure, axes = _figure(task)
    for index, (name, row) in enumerate(zip(_names(task), task["configurations"], strict=True)):
        style, score = series_style(index), score_of(task, row)
        low, high = score["interval"] or (score["min"], score["max"])
        x, y = cost(row), score["mean"]
        # The mean over runs can lie outside of its interval; error bars must not be negative.
        bars = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axes.errorbar(x, y, yerr=bars, color=style["color"], capsize=3, linewidth=1, alpha=0.7, zorder=2)
        fill = style["color"] if row["comparable"] else "white"
        marker = style | {"linestyle": "", "markerfacecolor": fill, "markersize": 8}
        axes.plot(x, y, **marker, zorder=3, label=name)
        axes.annotate(row["key"], (x, y), xytext=(7, 5), textcoords="offset points", fontsize=10, fontweight="bold")
    if not all(row["comparable"] for row in task["configurations"]):
        hollow = {"marker": "o", "markerfacecolor": "white", "color": "0.4", "linestyle": ""}
        axes.plot([], [], **hollow, label="hollow: not comparable")
    on_frontier = [row for row in task["configurations"] if row[frontier]]
    draw_frontier(axes, [(cost(row), score_of(task, row)["mean"]) for row in on_frontier])
    _add_majority(task, axes)
    title = f"{task['task']}: score and {label.removesuffix(', s')}"
    axes.set(xlabel=label, ylabel=_score_label(task), title=title)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    _add_legend(figure, axes)
    return figure


def _parameters(task: dict[str, Any]) -> Any:
    figure = _scores_by_cost(
        task, lambda row: row["parameters"]["trainable"], "trainable parameters", "front_parameters"
    )
    figure.axes[0].set_xscale("log")
    return figure


def _time(task: dict[str, Any]) -> Any:
    return _scores_by_cost(task, lambda row: row["train_seconds"]["mean"], "training time, s", "front_time")


def _memory(task: dict[str, Any]) -> Any:
    rows = task["configurations"]
    if not all(row["peak_memory"] for row in rows):
        return None
    figure, axes = load_pyplot().subplots(figsize=(WIDTH, 1.9 + 0.4 * len(rows)), layout="constrained")
    ends = [0.0] * len(rows)
    for part, color in zip(rows[0]["memory_parts"], PART_COLORS, strict=True):
        widths = [row["memory_parts"][part] / 1e6 for row in rows]
        axes.barh(_names(task), widths, left=ends, color=color, label=part, height=0.65)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("peak memory, MB")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{task['task']}: peak memory by part (gray: measured peak minus the computed parts)")
    return figure


def _confusion(task: dict[str, Any]) -> Any:
    panels = [
        (title, np.array(row["confusion"]))
        for title, row in zip(_names(task), task["configurations"], strict=True)
        if row["confusion"]
    ]
    if not panels:
        return None
    names = [name.replace("_", " ") for name in task["label_names"]]
    columns = min(CONFUSIONS_PER_ROW, len(panels))
    lines = -(-len(panels) // columns)
    size = (max(4.5, 2.9 * columns), 3.0 * lines + 0.6)
    figure, grid = load_pyplot().subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, counts) in zip(grid.flat, panels, strict=False):
        image = draw_matrix(axes, counts, names)
        axes.tick_params(axis="y", labelrotation=90)
        axes.set_title(textwrap.fill(title, CONFUSION_TITLE), fontsize=9)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="share of the label's rows", shrink=0.8)
    figure.supxlabel("prediction")
    figure.supylabel("label")
    figure.suptitle(f"{task['task']}: confusion matrices")
    return figure
