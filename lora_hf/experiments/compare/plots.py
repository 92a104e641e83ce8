"""The pictures of a comparison, drawn from its record: one of each kind for each task."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito 2008, "Color Universal Design": told apart with any kind of colour vision. Yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", "-.", ":")
PART_COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CCCCCC")
WIDTH = 9.0  # inches
DPI = 120
LONGEST_IN_TWO_COLUMNS = 55  # characters of a label in a legend
CONFUSIONS_A_ROW = 4
TITLE_WIDTH = 32  # characters over one confusion


def draw(task: dict[str, Any], folder: Path) -> dict[str, str]:
    """Writes the pictures of one task of a `ComparisonRecord`; returns their file names by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {}
    for kind, drawing in _DRAWINGS.items():
        figure = drawing(task)
        if figure is not None:
            drawn[kind] = f"{task['task']}-{kind}.png"
            figure.savefig(folder / drawn[kind], dpi=DPI)
            pyplot.close(figure)
    return drawn


def _look(place: int) -> dict[str, Any]:
    """A colour, a marker and a line style that no configuration near by in the list has together."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": STYLES[place // len(COLOURS) % len(STYLES)],
    }


def _names(task: dict[str, Any]) -> list[str]:
    # Between two dollar signs matplotlib reads a formula.
    return [f"{row['key']}: {row['label']}".replace("$", r"\$") for row in task["configurations"]]


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the axes, where it hides no data."""
    figure.legend(handles, labels, loc="outside lower center", ncols=_columns(labels), frameon=False, fontsize=9)


def _columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= LONGEST_IN_TWO_COLUMNS else 1


def _figure(rows: int, task: dict[str, Any], columns: int = 1, height: float = 4.2) -> tuple[Any, Any]:
    """Axes with room below them for a legend of all configurations."""
    from matplotlib import pyplot

    names = _names(task)
    legend = 0.2 * (len(names) / _columns(names) + 2)
    return pyplot.subplots(rows, columns, figsize=(WIDTH, height + legend), layout="constrained")


def _score_label(task: dict[str, Any]) -> str:
    better = "" if task["greater_is_better"] else ", less is better"
    return f"{task['metric'].replace('_', ' ')} ({task['split'].replace('_', ' ')}){better}"


def _majority(task: dict[str, Any]) -> float | None:
    return task["majority"].get(task["split"], {}).get(task["metric"])


def _curves(task: dict[str, Any]) -> Any:
    figure, (left, right) = _figure(1, task, columns=2)
    handles = []
    for place, row in enumerate(task["configurations"]):
        look = _look(place)
        for curve in row["curves"]:
            plain = {"color": look["color"], "linestyle": look["linestyle"]}
            if curve["loss"]:
                left.plot(*zip(*curve["loss"], strict=True), **plain, linewidth=1, alpha=0.8)
            if curve["score"]:
                right.plot(*zip(*curve["score"], strict=True), **look, markersize=5, linewidth=1.3, alpha=0.8)
        handles += right.plot([], [], **look)
    labels = _names(task)
    majority = _majority(task)
    if majority is not None:
        handles.append(right.axhline(majority, color="0.4", linestyle=":", linewidth=1.5))
        labels.append("always the same answer")
    left.set_ylabel("training loss")
    right.set_ylabel(_score_label(task))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    _legend(figure, handles, labels)
    figure.suptitle(f"{task['task']}: learning curves, a line for each run")
    return figure


def _scatter(task: dict[str, Any], at: Callable[[dict[str, Any]], float], front: str, xlabel: str, title: str) -> Any:
    """Scores with their intervals against a cost; those that are not comparable are hollow, the front is a line."""
    figure, axes = _figure(1, task, height=4.6)
    handles = []
    for place, row in enumerate(task["configurations"]):
        look = _look(place)
        score = row["scores"][task["split"]][task["metric"]]
        low, high = score["interval"] or (score["min"], score["max"])
        x, y = at(row), score["mean"]
        fill = look["color"] if row["comparable"] else "white"
        # The interval of a mean over several runs can in principle miss it; a bar has no negative length.
        bars = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axes.errorbar(x, y, yerr=bars, color=look["color"], capsize=3, linewidth=1, alpha=0.7, zorder=2)
        handles += axes.plot(
            x, y, color=look["color"], marker=look["marker"], markerfacecolor=fill, markersize=8, linestyle="", zorder=3
        )
        axes.annotate(row["key"], (x, y), xytext=(7, 5), textcoords="offset points", fontsize=10, fontweight="bold")
    labels = _names(task)
    if not all(row["comparable"] for row in task["configurations"]):
        handles += axes.plot([], [], marker="o", markerfacecolor="white", color="0.4", linestyle="")
        labels.append("hollow: not comparable")
    on_front = sorted(
        (at(row), row["scores"][task["split"]][task["metric"]]["mean"]) for row in task["configurations"] if row[front]
    )
    if len(on_front) > 1:
        handles += axes.step(*zip(*on_front, strict=True), where="post", color="0.4", linewidth=1.2, zorder=1)
        labels.append("Pareto front")
    majority = _majority(task)
    if majority is not None:
        handles.append(axes.axhline(majority, color="0.4", linestyle=":", linewidth=1.5, zorder=1))
        labels.append("always the same answer")
    axes.set(xlabel=xlabel, ylabel=_score_label(task))
    axes.set_title(title)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    _legend(figure, handles, labels)
    return figure


def _parameters(task: dict[str, Any]) -> Any:
    title = f"{task['task']}: quality against trained parameters"
    figure = _scatter(task, lambda row: row["parameters"]["trainable"], "front_parameters", "trained parameters", title)
    figure.axes[0].set_xscale("log")
    return figure


def _time(task: dict[str, Any]) -> Any:
    title = f"{task['task']}: quality against time"
    return _scatter(task, lambda row: row["train_seconds"]["mean"], "front_time", "training time, s", title)


def _memory(task: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    rows = task["configurations"]
    if not all(row["peak_memory"] for row in rows):
        return None
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.9 + 0.4 * len(rows)), layout="constrained")
    names = _names(task)
    reached = [0.0] * len(rows)
    for part, colour in zip(rows[0]["memory_parts"], PART_COLOURS, strict=True):
        widths = [row["memory_parts"][part] / 1e6 for row in rows]
        axes.barh(names, widths, left=reached, color=colour, label=part, height=0.65)
        reached = [before + width for before, width in zip(reached, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("peak memory, MB")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{task['task']}: memory by part; grey is what the computed parts leave of the measured peak")
    return figure


def _confusion(task: dict[str, Any]) -> Any:
    import numpy as np
    from matplotlib import pyplot

    rows = [row for row in task["configurations"] if row["confusion"]]
    titles = [name for name, row in zip(_names(task), task["configurations"], strict=True) if row["confusion"]]
    if not rows:
        return None
    names = [name.replace("_", " ") for name in task["label_names"]]
    columns = min(CONFUSIONS_A_ROW, len(rows))
    lines = -(-len(rows) // columns)
    size = (max(4.5, 2.9 * columns), 3.0 * lines + 0.6)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(rows):
            axes.axis("off")
            continue
        counts = np.array(rows[place]["confusion"])
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (truth, answer), count in np.ndenumerate(counts):
            colour = "white" if shares[truth, answer] > 0.5 else "black"
            axes.text(answer, truth, f"{count:,}", ha="center", va="center", color=colour, fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 2 else 0, fontsize=8)
        axes.set_yticks(range(len(names)), names, rotation=90, va="center", fontsize=8)
        axes.set_title(textwrap.fill(titles[place], TITLE_WIDTH), fontsize=9)
        if place % columns == 0:
            axes.set_ylabel("class")
        if place + columns >= len(rows):
            axes.set_xlabel("answer")
    figure.colorbar(image, ax=grid.ravel().tolist(), label="share of the class", shrink=0.8)
    figure.suptitle(f"{task['task']}: rows of each class by answer")
    return figure


_DRAWINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "curves": _curves,
    "parameters": _parameters,
    "time": _time,
    "memory": _memory,
    "confusion": _confusion,
}
