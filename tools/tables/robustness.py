"""The tables of damaged input, malformed requests and runs that were killed, from the records that `tests` write.

A table whose record has not been made says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_hf.core.formatting import table
from lora_hf.core.records import read_json_record

MAKERS = {"input.json": "robustness", "http.json": "malformed", "kills.json": "kills"}
NOT_MADE = {
    name: f"Not recorded yet: run `python -m tests.{maker} --output docs/results/robustness/{name}`."
    for name, maker in MAKERS.items()
}

# How a request may end, by its name in the record.
ENDS = {
    "requests": "requests",
    "malformed": "refused as malformed",
    "refused": "refused for what it asks",
    "accepted": "answered",
    "unavailable": "503 or 504 with its code",
    "failed": "another 5xx, or no documented form",
}


def damaged(results: Path) -> str:
    """By kind of input: how many cases, how each ended, and the most that one took."""
    record = _read(results, "input.json")
    if not record:
        return NOT_MADE["input.json"]
    rows = []
    for kind, counts in record["counts"].items():
        worst = record["worst"][kind]
        rows.append(
            [
                kind,
                f"{sum(counts.values()):,}",
                f"{counts.get('refused', 0):,}",
                f"{counts.get('used', 0):,}",
                f"{counts.get('escaped', 0):,}",
                f"{worst['seconds']:.1f}",
                f"{worst['memory'] / 1e6:.0f}",
            ]
        )
    head = ["input", "cases", "refused with a message", "used as meant", "tracebacks", "slowest, s", "most memory, MB"]
    return table(head, rows)


def malformed(results: Path) -> str:
    """By operation of the server: how many requests, and how each ended."""
    record = _read(results, "http.json")
    if not record:
        return NOT_MADE["http.json"]
    operations = [*record["operations"].items(), ("all", record["totals"])]
    rows = [[name, *(f"{counts.get(each, 0):,}" for each in ENDS)] for name, counts in operations]
    return table(["operation", *ENDS.values()], rows)


def malformed_answers(results: Path) -> str:
    """How many of these requests got which status, and which code of an error."""
    record = _read(results, "http.json")
    if not record:
        return NOT_MADE["http.json"]
    rows = [[answer, f"{count:,}"] for answer, count in record["answers"].items()]
    return table(["answer", "requests"], rows)


def kills(results: Path) -> str:
    """Each kill: when it came, where the run went on, and what it ended with otherwise than the run never stopped."""
    record = _read(results, "kills.json")
    if not record:
        return NOT_MADE["kills.json"]
    rows = [
        [
            f"{number}",
            f"{kill['seconds']:.2f}",
            kill["checkpoint"] or "the beginning",
            "yes" if kill["while_writing"] else "no",
            ", ".join(kill["differences"]) or "nothing",
        ]
        for number, kill in enumerate(record["kills"], start=1)
    ]
    head = ["kill", "after, s", "went on from", "while a checkpoint was written", "different in the end"]
    return table(head, rows, text_columns=5)


def _read(results: Path, name: str) -> dict[str, Any] | None:
    file = results / "robustness" / name
    return read_json_record(file) if file.exists() else None
