"""Where two runs disagree, row by row, with the texts of the rows; and for generation what two runs wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_hf.core.errors import DataError, UserError
from lora_hf.experiments.compare.runs import FinishedRun, WrittenText

SHOWN = 10  # rows of each kind
REFERENCES_SHOWN = 3


def disagreements(first: FinishedRun, second: FinishedRun, data_dir: str | None) -> dict[str, Any]:
    """How often one, both or neither is right, and the first rows of each kind with their text.

    For a regression the rows where the two scores are furthest apart.
    """
    split = first.split
    labels = first.answers[split].labels
    answers = [run.answers[split].predictions for run in (first, second)]
    if not first.task.label_names:
        gap = np.abs(answers[0] - answers[1])
        kinds = {"furthest apart": np.argsort(-gap, kind="stable")[:SHOWN]}
        counts = {}
    else:
        right, also = (each == labels for each in answers)
        every = {"only_first": right & ~also, "only_second": also & ~right, "neither": ~right & ~also}
        counts = {"both": int((right & also).sum()), **{kind: int(rows.sum()) for kind, rows in every.items()}}
        kinds = {kind: np.flatnonzero(rows)[:SHOWN] for kind, rows in every.items()}
    chosen = [int(row) for rows in kinds.values() for row in rows]
    texts, reason = _texts(first, split, chosen, data_dir)
    listed = {
        kind: [
            {
                "row": int(row),
                "label": _name(first, float(labels[row])),
                "answers": [_name(first, float(each[row])) for each in answers],
                "texts": texts.get(int(row), {}),
            }
            for row in rows
        ]
        for kind, rows in kinds.items()
    }
    return {"split": split, "counts": counts, "rows": listed, "without_texts": reason}


def _texts(
    run: FinishedRun, split: str, chosen: Sequence[int], data_dir: str | None
) -> tuple[dict[int, dict[str, str]], str | None]:
    """The text columns of the rows; none, and the reason, where the data are not to be had."""
    if not chosen:
        return {}, None
    try:
        rows = run.task.load(data_dir or run.record.config["task"]["data_dir"], [split])[split]
        labels = run.answers[split].labels
        if len(rows) != len(labels) or not np.allclose(np.asarray(rows["label"], dtype=float), labels):
            raise DataError("the rows there have other labels than those that the runs were scored on")
    except UserError as error:
        return {}, str(error)
    columns = run.task.text_columns
    return {row: {column: rows[row][column] for column in columns} for row in chosen}, None


def _name(run: FinishedRun, answer: float) -> str | float:
    names = run.task.label_names
    return names[int(answer)] if names else answer


def written(first: Sequence[WrittenText], second: Sequence[WrittenText]) -> dict[str, Any]:
    """How many inputs two runs wrote the same text for, and the first where they did not."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.output != b.output]
    rows = [
        {
            "input": a.input,
            "references": a.references[:REFERENCES_SHOWN],
            "more_references": max(0, len(a.references) - REFERENCES_SHOWN),
            "outputs": [a.output, b.output],
        }
        for a, b in pairs[:SHOWN]
    ]
    return {"inputs": len(first), "same": len(first) - len(pairs), "rows": rows}
