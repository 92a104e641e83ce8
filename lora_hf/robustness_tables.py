"""The tables of runs that were killed and of damaged input, from the records that `tests` write.

A table whose record has not been made says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_hf.errors import DataError
from lora_hf.markdown import table

NOT_MADE = "Not recorded yet: run `{command} --output docs/results/robustness/{file}`."


def damaged(results: Path) -> str:
    """By kind of input: how many cases, how each ended, and the most that one took."""
    file = results / "robustness" / "input.json"
    if not file.exists():
        return NOT_MADE.format(command="python -m tests.robustness", file=file.name)
    record, rows = _read(file), []
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


def kills(results: Path) -> str:
    """Each kill: when it came, where the run went on, and what it ended with otherwise than the run never stopped."""
    file = results / "robustness" / "kills.json"
    if not file.exists():
        return NOT_MADE.format(command="python -m tests.kills", file=file.name)
    record = _read(file)
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
    return table(head, rows, words=5)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable: {error}") from error
