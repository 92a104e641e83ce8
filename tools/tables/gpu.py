"""The tables of the GPU check: what was measured, or that nothing was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_hf.core.formatting import percent, table
from lora_hf.core.records import read_json_record

RECORD = "gpu.json"
NOT_MEASURED = "Not measured: no record of `python -m tools.gpu_check` exists."
TRAINING = ("b", "c", "u")  # parts that compare sides


def gpu(results: Path) -> str:
    """What each part found, then the sides that trained."""
    file = results / RECORD
    if not file.exists():
        return NOT_MEASURED
    record = read_json_record(file)
    parts = record["parts"]
    memory = f", {record['device_memory'] / 1e9:.0f} GB" if record["device_memory"] else ""
    caption = f"{record['device']}{memory}, {record['date'][:10]} ([record](results/{RECORD}))."
    outcomes = table(["part", "seconds", "outcome"], [_outcome(part) for part in parts.values()], text_columns=3)
    sides = [row for name in TRAINING if "results" in parts.get(name, {}) for row in _sides(parts[name]["results"])]
    head = ["workload", "weights", "side", "tokens/s", "share of peak, %", "peak memory, MB", "losses agree"]
    return "\n\n".join([caption, outcomes, *([table(head, sides, text_columns=3)] if sides else [])])


def _outcome(part: dict[str, Any]) -> list[str]:
    if "skipped" in part:
        return [part["title"], "-", f"skipped: {part['skipped']}"]
    checks = list(_checks(part["results"]))
    wrong = sum(check.get("holds") is False or check.get("agrees") is False for check in checks)
    counts = {
        "failed": sum("failed" in check for check in checks),
        "wrong": wrong,
        "skipped": sum("skipped" in check for check in checks),
    }
    stopped = [f"stopped {part['stopped']}"] if "stopped" in part else []
    text = ", ".join([*stopped, *(f"{count} {name}" for name, count in counts.items() if count)]) or "passed"
    return [part["title"], f"{part['seconds']:.0f}", text]


def _checks(found: Any) -> Iterator[dict[str, Any]]:
    """Every dict inside that says how something ended."""
    if isinstance(found, dict):
        if found.keys() & {"failed", "skipped", "holds", "agrees"}:
            yield found
        for value in found.values():
            yield from _checks(value)


def _sides(results: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each side; of the part against Unsloth the workload is the part itself."""
    workloads = {"E2E": results} if "sides" in results else results
    for title, workload in workloads.items():
        if not isinstance(workload, dict) or "sides" not in workload:
            continue
        for name, side in workload["sides"].items():
            if "tokens_per_second" not in side:
                row = ["-", "-", "-", "failed" if "failed" in side else "skipped"]
            else:
                agrees = {True: "yes", False: "no"}.get(side.get("agrees"), "-")  # type: ignore[arg-type]
                memory = f"{side['peak_memory'] / 1e6:,.0f}" if side["peak_memory"] else "-"
                row = [f"{side['tokens_per_second']:,.0f}", percent(side["share_of_peak"]), memory, agrees]
            yield [title, workload["weights"], name, *row]
