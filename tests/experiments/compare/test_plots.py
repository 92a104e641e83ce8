from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from lora_hf.experiments.compare import plots

LABELS = ("no", "maybe", "yes")


def task(configurations: int, text: bool = False) -> dict[str, Any]:
    """What a `ComparisonRecord` holds for a task, as far as pictures need it."""
    rows = []
    for place in range(configurations):
        score = {"mean": 0.9 - 0.03 * place, "min": 0.88 - 0.03 * place, "max": 0.91 - 0.03 * place}
        rows.append(
            {
                "key": chr(ord("A") + place),
                "label": f"LoRA r={2**place} on q, k, v, o, ffn_up" + ("" if place else ", start_from=$a^^$b"),
                "comparable": place % 3 != 2,
                "scores": {"validation": {"accuracy": {**score, "interval": None if text else [0.4, 0.95]}}},
                "curves": [{"seed": 0, "loss": [[1, 0.9], [2, 0.5]], "score": [[1, 0.4], [2, score["mean"]]]}],
                "parameters": {"trainable": 1_000 * 2**place},
                "train_seconds": {"mean": 100.0 + 17 * place},
                "peak_memory": 1_000_000,
                "memory_parts": {"a": 100, "b": 200, "c": 300, "d": 400, "rest": 999_000},
                "confusion": None if text else [[9, 1, 0], [2, 7, 1], [0, 0, 1_000]],
                "front_parameters": place < 2,
                "front_time": place < 2,
            }
        )
    majority = {} if text else {"validation": {"accuracy": 0.5}}
    return {"task": "t", "split": "validation", "metric": "accuracy", "greater_is_better": not text,
            "label_names": [] if text else LABELS, "majority": majority, "configurations": rows}  # fmt: skip


@pytest.mark.parametrize("configurations", [1, pytest.param(12, marks=pytest.mark.full)])
def test_every_picture_is_drawn_for_few_and_many(configurations: int, tmp_path: Path) -> None:
    drawn = plots.draw_plots(task(configurations), tmp_path)
    assert drawn == {kind: f"t-{kind}.png" for kind in ("curves", "parameters", "time", "memory", "confusion")}
    for file in drawn.values():
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == [], "a figure is closed once it is written"


def test_a_task_without_classes_has_no_confusion(tmp_path: Path) -> None:
    assert "confusion" not in plots.draw_plots(task(2, text=True), tmp_path)


@pytest.mark.parametrize("configurations", [2, 12])
@pytest.mark.parametrize("drawing", [plots._curves, plots._parameters, plots._time, plots._memory])
def test_the_legend_hides_no_data(drawing: Any, configurations: int) -> None:
    figure = drawing(task(configurations))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, "it is inside the picture"
    for axes in figure.axes:
        assert not axes.get_window_extent().overlaps(box)
        assert axes.get_xlabel()
        assert axes.get_window_extent().height > 0.3 * figure.bbox.height, "the legend leaves room for the data"
    pyplot.close(figure)
