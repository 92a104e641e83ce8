"""The table of what exported adapters compute in the programs they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_hf.core.formatting import table
from lora_hf.core.records import read_json_record, record_files

CONVERTER = "convert_lora_to_gguf.json"


def engines(results: Path) -> str:
    """A row for each engine and kind of base: the largest differences, and the smallest effect of an adapter."""
    rows: list[list[str]] = []
    for file in record_files(results / "export"):
        if file.name != CONVERTER:
            rows += _rows(read_json_record(file), file.name)
    head = ["engine (record)", "base", "method", "compared", "difference, base", "difference, adapter", "effect"]
    return table(head, rows, text_columns=4)


def _rows(record: dict[str, Any], name: str) -> list[list[str]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for check in record["checks"]:
        if "failed" not in check:
            groups.setdefault((check["base"], check["method"], check["compared"]), []).append(check)
    rows = []
    for (base, method, compared), checks in groups.items():
        kinds = ", ".join(sorted(check["model_type"] for check in checks))
        rows.append(
            [
                f"[{record['package']}](results/export/{name})",
                f"{base}: {kinds}",
                method,
                compared,
                f"{max(check['base_difference'] for check in checks):.1e}",
                f"{max(check['adapter_difference'] for check in checks):.1e}",
                f"{min(check['effect'] for check in checks):.2f}",
            ]
        )
    return rows


def converter(results: Path) -> str:
    """The model types whose GGUF file equals that of llama.cpp's converter, and the others with the reason."""
    checks = read_json_record(results / "export" / CONVERTER)["checks"]
    rows = [
        [
            check["model_type"],
            str(check.get("tensors", "-")),
            check.get("failed") or f"{check['largest_difference']:.0e}",
        ]
        for check in checks
    ]
    return table(["model type", "tensors", "largest difference"], rows)
