"""The style that all plots of experiments share, and the Pareto frontier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from lora_hf.training.evaluation_plots import load_pyplot

# Okabe and Ito 2008, "Color Universal Design": distinguishable with any kind of color vision. Without yellow, which is
# too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES = ("-", "--", "-.", ":")
DPI = 120


def save(figure: Any, path: Path, **options: Any) -> Path:
    """Writes the figure, with options of `savefig`, and closes it."""
    figure.savefig(path, dpi=DPI, **options)
    load_pyplot().close(figure)
    return path


def series_style(index: int) -> dict[str, Any]:
    """The color, marker and line style of a series; the combination repeats late."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)],
    }


def pareto_frontier(
    costs: Sequence[float],
    values: Sequence[float],
    greater_is_better: bool = True,
    eligible: Sequence[bool] | None = None,
) -> list[bool]:
    """Whether each point is on the Pareto frontier: no other point is at least as good in both and better in one.

    Points that are not eligible are not on it, and beat no other.
    """
    signed = values if greater_is_better else [-value for value in values]
    points = list(zip(costs, signed, strict=True))
    counted = points if eligible is None else list(compress(points, eligible))
    return [
        (eligible is None or eligible[index])
        and not any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in counted)
        for index, point in enumerate(points)
    ]


def draw_frontier(axes: Any, points: Sequence[tuple[float, float]]) -> list[Any]:
    """Draws a dashed line through the points of a Pareto frontier, if there are several; returns its handles."""
    if len(points) < 2:
        return []
    style = {"color": "0.4", "linestyle": "--", "linewidth": 1.2, "zorder": 1, "label": "Pareto frontier"}
    return axes.step(*zip(*sorted(points), strict=True), where="post", **style)


def draw_majority(axes: Any, value: float) -> Any:
    """Draws the score of always predicting the majority class as a dotted line."""
    return axes.axhline(value, color="0.4", linestyle=":", linewidth=1.5, zorder=1, label="majority class")
