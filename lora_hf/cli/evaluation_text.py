"""An evaluation of a classifier as lines of text: what `eval` prints below the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_hf.core.formatting import cut

MOST_CLASSES = 50
MISTAKES = 5  # --json and the record of the run have all
LONGEST = 100  # characters of a text


def describe_evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of the classes, the calibration, the errors of a regression, and the worst mistakes."""
    classes = evaluation.get("classes", {})
    if classes:
        yield from _table(classes)
    if "calibration" in evaluation:
        yield f"expected calibration error: {evaluation['calibration']['ece']:.4f}"
    if "errors" in evaluation:
        yield "  ".join(f"{name} {value:.4f}" for name, value in evaluation["errors"].items())
    mistakes = evaluation.get("mistakes", [])
    if mistakes:
        worst = "most confident mistakes" if classes else "largest errors"
        yield f"{worst} ({min(MISTAKES, len(mistakes))} of {len(mistakes)} kept; --json shows all):"
    for mistake in mistakes[:MISTAKES]:
        texts = " | ".join(cut(" ".join(text.split()), LONGEST) for text in mistake["texts"].values())
        confidence = f" ({mistake['confidence']:.4f})" if "confidence" in mistake else ""
        yield f"  row {mistake['row']}: {mistake['prediction']}{confidence}, label {mistake['label']}: {texts}"


def _table(classes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    names = [name for name in next(iter(classes.values())) if name != "predicted"]
    width = max(5, *map(len, classes))
    yield f"  {'class':{width}}  " + "  ".join(f"{name:>9}" for name in names)
    for name, scores in list(classes.items())[:MOST_CLASSES]:
        cells = (f"{scores[key]:9d}" if key == "support" else f"{scores[key]:9.4f}" for key in names)
        yield f"  {name:{width}}  " + "  ".join(cells)
    if len(classes) > MOST_CLASSES:
        yield f"  and {len(classes) - MOST_CLASSES} more classes; --json shows all"
