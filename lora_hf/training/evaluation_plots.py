"""Plots of a classifier's errors: the confusion matrix, and the reliability of its probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MOST_NAMED = 20  # classes whose names and numbers are readable in a matrix
LABELS_PER_ROW = 4


def draw_evaluation(evaluation: Mapping[str, Any], title: str, folder: Path, split: str) -> list[Path]:
    """Draws `confusion-<split>.png` and `reliability-<split>.png` where the evaluation has the data; returns the files.

    Args:
        evaluation: the output of `data.metrics.evaluation`.
    """
    draw = {"confusion": _draw_confusions, "calibration": _draw_reliability}
    files = {"confusion": f"confusion-{split}.png", "calibration": f"reliability-{split}.png"}
    drawn = []
    for key, file in files.items():
        if key in evaluation:
            figure = draw[key](evaluation)
            figure.suptitle(escape_formula(title))
            figure.savefig(folder / file, dpi=110)
            load_pyplot().close(figure)
            drawn.append(folder / file)
    return drawn


def escape_formula(text: str) -> str:
    return text.replace("$", r"\$")  # between two dollar signs matplotlib reads a formula


def load_pyplot() -> Any:
    """Returns `matplotlib.pyplot`, set up to write files without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_confusions(evaluation: Mapping[str, Any]) -> Any:
    """Draws one matrix of all classes or, for several labels per row, one per label."""
    confusion, names = evaluation["confusion"], list(map(escape_formula, evaluation["classes"]))
    if isinstance(confusion, list):
        side = min(12.0, 3.5 + 0.45 * len(names))
        figure, axes = load_pyplot().subplots(figsize=(side + 1, side), layout="constrained")
        draw_matrix(axes, np.array(confusion), names)
        axes.set(xlabel="prediction", ylabel="label")
        return figure
    shown = names[: MOST_NAMED * LABELS_PER_ROW]
    lines = -(-len(shown) // LABELS_PER_ROW)
    figure, grid = load_pyplot().subplots(
        lines, LABELS_PER_ROW, figsize=(2.6 * LABELS_PER_ROW, 2.6 * lines + 0.5), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    for axes, name, counts in zip(grid.flat, shown, confusion.values(), strict=False):
        draw_matrix(axes, np.array(counts), ["no", "yes"])
        axes.set_title(name, fontsize=9)
    figure.supxlabel("prediction")
    figure.supylabel("label")
    return figure


def draw_matrix(axes: Any, counts: np.ndarray, names: list[str]) -> Any:
    """Draws a matrix of row counts, colored by their share of the label's rows. Returns the image."""
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) > MOST_NAMED:
        return image
    for (label, prediction), count in np.ndenumerate(counts):
        color = "white" if shares[label, prediction] > 0.5 else "black"
        axes.text(prediction, label, f"{count:,}", ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 2 else 0, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    return image


def _draw_reliability(evaluation: Mapping[str, Any]) -> Any:
    """Draws the accuracy and the number of predictions in each bin of probabilities."""
    bins, error = evaluation["calibration"]["bins"], evaluation["calibration"]["ece"]
    starts, widths = [each["from"] for each in bins], [each["to"] - each["from"] for each in bins]
    figure, (upper, lower) = load_pyplot().subplots(
        2, 1, figsize=(5, 5.5), height_ratios=[3, 1], sharex=True, layout="constrained"
    )
    upper.bar(starts, [each["accuracy"] for each in bins], widths, align="edge", edgecolor="white", label="accuracy")
    upper.plot(
        [each["confidence"] for each in bins], [each["confidence"] for each in bins], "k.--", label="mean probability"
    )
    upper.set(ylabel="share of right predictions", title=f"expected calibration error {error:.4f}")
    upper.set(xlim=(0, 1), ylim=(0, 1))
    upper.legend(loc="upper left")
    lower.bar(starts, [each["count"] for each in bins], widths, align="edge", edgecolor="white")
    lower.set(xlabel="probability", ylabel="predictions")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure
