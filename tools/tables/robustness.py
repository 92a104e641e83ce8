"""Tables of damaged input, malformed requests, killed runs, situations and attacks.

A table without a record shows the command that makes one. The records of situations and attacks are kept by hand;
`tests/project/test_situations.py` checks them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_hf.core.formatting import table
from lora_hf.core.records import read_json_record

MAKERS = {"input.json": "damaged_inputs", "http.json": "malformed_requests", "kills.json": "kills"}
NOT_MADE = {
    name: f"Not recorded yet: run `python -m tests.support.{maker} --output docs/results/robustness/{name}`."
    for name, maker in MAKERS.items()
}

# Column headers for the outcomes of a request, by their keys in the record.
OUTCOMES = {
    "requests": "requests",
    "malformed": "rejected as malformed",
    "refused": "well-formed but rejected",
    "accepted": "succeeded",
    "unavailable": "503 or 504 (documented)",
    "failed": "undocumented error",
}


def damaged(results: Path) -> str:
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
    head = [
        "input",
        "cases",
        "rejected with one error",
        "accepted",
        "tracebacks",
        "slowest, s",
        "peak extra memory, MB",
    ]
    return table(head, rows)


def malformed(results: Path) -> str:
    record = _read(results, "http.json")
    if not record:
        return NOT_MADE["http.json"]
    operations = [*record["operations"].items(), ("all", record["totals"])]
    rows = [[name, *(f"{counts.get(outcome, 0):,}" for outcome in OUTCOMES)] for name, counts in operations]
    return table(["operation", *OUTCOMES.values()], rows)


def malformed_answers(results: Path) -> str:
    record = _read(results, "http.json")
    if not record:
        return NOT_MADE["http.json"]
    rows = [[response, f"{count:,}"] for response, count in record["answers"].items()]
    return table(["response", "requests"], rows)


def kills(results: Path) -> str:
    record = _read(results, "kills.json")
    if not record:
        return NOT_MADE["kills.json"]
    rows = [
        [
            f"{number}",
            f"{kill['seconds']:.2f}",
            kill["checkpoint"] or "step 0",
            "yes" if kill["while_writing"] else "no",
            ", ".join(kill["differences"]) or "none",
        ]
        for number, kill in enumerate(record["kills"], start=1)
    ]
    head = ["kill", "killed after, s", "resumed from", "during a checkpoint write", "differences at the end"]
    return table(head, rows, text_columns=5)


def situations(results: Path) -> str:
    record = _read(results, "situations.json")
    if not record:
        return "No situations are recorded."
    rows = [
        [record["kinds"][row["kind"]], row["situation"], row["before"], row["now"], _tests(row["tests"])]
        for row in record["situations"]
    ]
    return table(["kind", "situation", "before", "now", "held by"], rows, text_columns=5)


def attacks(results: Path) -> str:
    record = _read(results, "attacks.json")
    if not record:
        return "No attacks are recorded."
    rows = [[row["name"], row["tries"], row["before"], row["after"]] for row in record["attacks"]]
    return table(["attack", "what it tries", "before", "after"], rows, text_columns=4)


def _tests(ids: list[str]) -> str:
    """The files of the tests, each once."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(each.partition("::")[0] for each in ids))


def _read(results: Path, name: str) -> dict[str, Any] | None:
    file = results / "robustness" / name
    return read_json_record(file) if file.exists() else None
