"""Rows on which two runs disagree, and the texts that two runs generated: what to show, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_hf.core.errors import DataError, UserError
from lora_hf.core.formatting import table
from lora_hf.experiments.compare.configurations import Configuration
from lora_hf.experiments.compare.markdown import escape
from lora_hf.experiments.compare.runs import FinishedRun

SHOWN = 10  # rows of each kind
REFERENCES_SHOWN = 3
HEADINGS = {
    "only_first": "only {first} is right",
    "only_second": "only {second} is right",
    "neither": "both are wrong",
    "furthest apart": "the two differ most",
}


def find_disagreements(found: Sequence[Configuration], data_dir: str | None) -> dict[str, Any] | None:
    """Compares the median runs of the two best configurations, or the first two runs of a single one.

    Returns:
        How often one, both or neither is right, with the first rows of each kind; for a regression the rows with the
        largest difference. None if there are no two such runs.
    """
    ranked = [each for each in found if each.same_data]
    pairs = [(each, each.median_run) for each in ranked]
    if len(ranked) == 1:
        pairs = [(ranked[0], run) for run in ranked[0].runs]
    pairs = [(each, run) for each, run in pairs if run.split in run.predictions][:2]
    if len(pairs) < 2:
        return None
    run, names = pairs[0][1], pairs[0][1].task.label_names
    labels = run.predictions[run.split].labels
    first, second = (other.predictions[run.split].predicted for _, other in pairs)
    counts = {}
    if names:
        right, also_right = first == labels, second == labels
        masks = {
            "only_first": right & ~also_right,
            "only_second": also_right & ~right,
            "neither": ~right & ~also_right,
        }
        counts = {"both": int((right & also_right).sum()), **{kind: int(mask.sum()) for kind, mask in masks.items()}}
        kinds = {kind: np.flatnonzero(mask)[:SHOWN].tolist() for kind, mask in masks.items()}
    else:
        kinds = {"furthest apart": np.argsort(-np.abs(first - second), kind="stable")[:SHOWN].tolist()}
    texts, reason = _texts(run, [row for rows in kinds.values() for row in rows], data_dir)

    def answer(value: Any) -> str | float:
        return names[int(value)] if names else float(value)

    rows = {
        kind: [
            {
                "row": row,
                "label": answer(labels[row]),
                "answers": [answer(first[row]), answer(second[row])],
                "texts": texts.get(row, {}),
            }
            for row in indices
        ]
        for kind, indices in kinds.items()
    }
    between = [_side(*pair) for pair in pairs]
    return {"between": between, "split": run.split, "counts": counts, "rows": rows, "without_texts": reason}


def _texts(
    run: FinishedRun, chosen: Sequence[int], data_dir: str | None
) -> tuple[dict[int, dict[str, str]], str | None]:
    """The text columns of the rows, or the reason why they are not available."""
    if not chosen:
        return {}, None
    try:
        rows = run.task.load(data_dir or run.record.config["task"]["data_dir"], [run.split])[run.split]
        labels = run.predictions[run.split].labels
        if len(rows) != len(labels) or not np.allclose(np.asarray(rows["label"], dtype=float), labels):
            raise DataError("the rows have other labels than those the runs were scored on")
    except UserError as error:
        return {}, str(error)
    return {row: {column: rows[row][column] for column in run.task.text_columns} for row in chosen}, None


def find_different_texts(found: Sequence[Configuration]) -> list[dict[str, Any]]:
    """The texts of the two best configurations, for each split with generated texts of both."""
    shown = []
    for name in dict.fromkeys(texts.name for each in found for run in each.runs for texts in run.texts):
        pairs = [(each, scored.texts) for each in found for scored in each.runs[0].texts if scored.name == name][:2]
        inputs = [[text["input"] for text in texts] for _, texts in pairs]
        if len(pairs) < 2 or inputs[0] != inputs[1]:
            continue
        texts = list(zip(pairs[0][1], pairs[1][1], strict=True))
        different = [(first, second) for first, second in texts if first["output"] != second["output"]]
        rows = [
            {
                "input": first["input"],
                "references": first["references"][:REFERENCES_SHOWN],
                "more_references": max(0, len(first["references"]) - REFERENCES_SHOWN),
                "outputs": [first["output"], second["output"]],
            }
            for first, second in different[:SHOWN]
        ]
        between = [_side(each, each.runs[0]) for each, _ in pairs]
        counts = {"inputs": len(texts), "same": len(texts) - len(different)}
        shown.append({"name": name, "between": between, **counts, "rows": rows})
    return shown


def _side(each: Configuration, run: FinishedRun) -> dict[str, Any]:
    return {"key": each.key, "label": each.label, "seed": run.record.seed, "folder": str(run.folder)}


def disagreement_section(found: dict[str, Any] | None) -> str:
    """The Markdown of `find_disagreements`."""
    if found is None:
        return ""
    first, second = names = _names(found["between"])
    parts = ["### Disagreements", f"{_versus(found['between'])}, on {escape(found['split'])}."]
    if counts := found["counts"]:
        rows = [
            [f"{first} is right", str(counts["both"]), str(counts["only_first"])],
            [f"{first} is wrong", str(counts["only_second"]), str(counts["neither"])],
        ]
        parts.append(table(["", f"{second} is right", f"{second} is wrong"], rows))
    if found["without_texts"]:
        parts.append(f"The texts of the rows are not available: {escape(found['without_texts'])}")
    for kind, rows in found["rows"].items():
        if rows:
            parts.append(f"**First rows where {HEADINGS[kind].format(first=first, second=second)}:**")
            parts += [_quote(row, names) for row in rows]
    return "\n\n".join(parts)


def texts_section(found: dict[str, Any]) -> str:
    """The Markdown of an entry of `find_different_texts`."""
    rows = []
    for row in found["rows"]:
        references = " / ".join(map(escape, row["references"]))
        more = f" / and {row['more_references']} more" if row["more_references"] else ""
        rows.append([escape(row["input"]), references + more, *map(escape, row["outputs"])])
    summary = f"{_versus(found['between'])}. {found['same']} of {found['inputs']} texts are the same"
    body = table(["input", "references", *_names(found["between"])], rows, text_columns=4)
    summary += f"; the first different ones:\n\n{body}" if rows else "."
    return f"### Generated texts, {escape(found['name'])}\n\n{summary}"


def _quote(row: dict[str, Any], names: list[str]) -> str:
    def shown(answer: str | float) -> str:
        return escape(answer) if isinstance(answer, str) else f"{answer:.3f}"

    answers = ", ".join(f"{name} predicts {shown(answer)}" for name, answer in zip(names, row["answers"], strict=True))
    sentence = f"Row {row['row']}, label {shown(row['label'])}: {answers}."
    lines = [f"> **{escape(column)}:** {escape(text)}" for column, text in row["texts"].items()]
    return sentence + "\n\n" + "\\\n".join(lines) if lines else sentence


def _names(between: list[dict[str, Any]]) -> list[str]:
    """The letters of the two configurations; of one configuration, with the seed."""
    keys = [side["key"] for side in between]
    return keys if len(set(keys)) == len(keys) else [f"{side['key']}{side['seed']}" for side in between]


def _versus(between: list[dict[str, Any]]) -> str:
    sides = zip(_names(between), between, strict=True)
    return " versus ".join(f"{name} ({escape(side['label'])}, seed {side['seed']})" for name, side in sides)
