"""The scores by class, the calibration and the most confident mistakes in a report: those of the median runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_hf.core.formatting import table
from lora_hf.experiments.compare.markdown import escape
from lora_hf.experiments.plots import load_pyplot, series_style

MOST_CLASSES = 30


def evaluation_sections(task: dict[str, Any]) -> Iterator[str]:
    """Yields the Markdown of what the configurations' `evaluation` holds."""
    rows = [(row["key"], row["evaluation"]) for row in task["configurations"] if row.get("evaluation")]
    by_class = [(key, found["classes"]) for key, found in rows if "classes" in found]
    if by_class:
        yield "### Scores by class"
        yield _class_table(by_class)
    if mistakes := [(key, found["mistakes"]) for key, found in rows if found.get("mistakes")]:
        yield "### Most confident mistakes" if by_class else "### Largest errors"
        yield f"Of {mistakes[0][0]}, the first configuration that has any."
        yield _mistake_table(mistakes[0][1])


def calibration_table(task: dict[str, Any]) -> str:
    """The expected calibration error of each configuration."""
    found = [(row["key"], row["evaluation"]["calibration"]["ece"]) for row in _calibrated(task)]
    return table(["", "expected calibration error"], [[key, f"{error:.4f}"] for key, error in found])


def draw_reliability(task: dict[str, Any]) -> Any:
    """The share of right predictions by their probability; None without classifiers."""
    rows = _calibrated(task)
    if not rows:
        return None
    figure, axes = load_pyplot().subplots(figsize=(5.5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="calibrated")
    for index, row in enumerate(rows):
        bins = row["evaluation"]["calibration"]["bins"]
        points = [[each["confidence"] for each in bins], [each["accuracy"] for each in bins]]
        axes.plot(*points, **series_style(index), markersize=5, label=row["key"])
    axes.set(xlabel="mean probability", ylabel="share of right predictions", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"{task['task']}: reliability")
    return figure


def _calibrated(task: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in task["configurations"] if "calibration" in (row.get("evaluation") or {})]


def _class_table(by_class: list[tuple[str, dict[str, Any]]]) -> str:
    names = list(by_class[0][1])[:MOST_CLASSES]
    head = ["class", "", "precision", "recall", "F1", "rows", "predicted"]
    lines = []
    for name in names:
        for key, classes in by_class:
            scores = classes[name]
            numbers = [f"{scores[each]:.3f}" for each in ("precision", "recall", "f1")]
            lines.append([escape(name), key, *numbers, scores["support"], scores["predicted"]])
    more = len(by_class[0][1]) - len(names)
    return table(head, lines, text_columns=2) + (f"\n\nand {more} more classes, in the record." if more else "")


def _mistake_table(mistakes: list[dict[str, Any]]) -> str:
    columns = list(mistakes[0]["texts"])
    sure = "confidence" in mistakes[0]
    head = ["label", "prediction", *map(escape, columns), *(["confidence"] if sure else []), "row"]
    lines = [
        [
            escape(str(each["label"])),
            escape(str(each["prediction"])),
            *(escape(each["texts"][column]) for column in columns),
            *([f"{each['confidence']:.3f}"] if sure else []),
            each["row"],
        ]
        for each in mistakes
    ]
    return table(head, lines, text_columns=2 + len(columns))
