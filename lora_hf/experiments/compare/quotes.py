"""Rows of the data and texts of models, quoted in a report so that nothing in them is taken for Markdown."""

from __future__ import annotations

import re
from typing import Any

from lora_hf.core.formatting import table

SPECIAL = re.compile(r"([\\`*_\[\]<>|#&~$!])")
KINDS = {
    "only_first": "only {first} is right",
    "only_second": "only {second} is right",
    "neither": "both are wrong",
    "furthest apart": "the two are furthest apart",
}


def plain(text: str) -> str:
    """The text as Markdown that shows it as it is, on one line."""
    one_line = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
    return SPECIAL.sub(r"\\\1", one_line)


def disagreement_section(task: dict[str, Any]) -> str:
    """Where the two best runs disagree; empty where there are no two."""
    found = task["disagreements"]
    if found is None:
        return ""
    names = _names(found["between"])
    lines = ["### Where they disagree", f"{_against(found['between'])}, on {plain(found['split'])}."]
    if found["counts"]:
        counts = found["counts"]
        lines.append(
            table(
                ["", f"{names[1]} is right", f"{names[1]} is wrong"],
                [
                    [f"{names[0]} is right", str(counts["both"]), str(counts["only_first"])],
                    [f"{names[0]} is wrong", str(counts["only_second"]), str(counts["neither"])],
                ],
            )
        )
    if found["without_texts"]:
        lines.append(f"The rows are given without their texts: {plain(found['without_texts'])}")
    for kind, rows in found["rows"].items():
        if rows:
            lines.append(f"**Rows where {KINDS[kind].format(first=names[0], second=names[1])}**, the first of them:")
            lines += [_row(row, names) for row in rows]
    return "\n\n".join(lines)


def _row(row: dict[str, Any], names: list[str]) -> str:
    sides = zip(names, row["answers"], strict=True)
    answers = ", ".join(f"{name} answered {_answer(answer)}" for name, answer in sides)
    quoted = "".join(f"\n> **{plain(column)}:** {plain(text)}\\" for column, text in row["texts"].items())
    said = f"Row {row['row']} is {_answer(row['label'])}; {answers}."
    return f"{said}\n{quoted}".removesuffix("\\") if quoted else said


def _answer(answer: str | float) -> str:
    return plain(answer) if isinstance(answer, str) else f"{answer:.3f}"


def _names(between: list[dict[str, Any]]) -> list[str]:
    """Their letters; where these are the same, with the seed behind."""
    keys = [side["key"] for side in between]
    return keys if len(set(keys)) == len(keys) else [f"{side['key']}{side['seed']}" for side in between]


def _against(between: list[dict[str, Any]]) -> str:
    sides = zip(_names(between), between, strict=True)
    return " against ".join(f"{name} ({plain(side['label'])}, seed {side['seed']})" for name, side in sides)


def written_section(found: dict[str, Any]) -> str:
    """What two runs wrote for the first inputs where their texts differ."""
    names = _names(found["between"])
    rows = []
    for row in found["rows"]:
        references = " / ".join(plain(reference) for reference in row["references"])
        more = f" / and {row['more_references']} more" if row["more_references"] else ""
        rows.append([plain(row["input"]), references + more, *(plain(output) for output in row["outputs"])])
    said = f"{_against(found['between'])}. {found['same']} of {found['inputs']} texts are the same"
    said += "; the first that are not:" if rows else "."
    body = table(["input", "references", *names], rows, text_columns=4) if rows else ""
    return f"### Texts, {plain(found['name'])}\n\n{said}\n\n{body}".rstrip()
