"""Tables of `benchmark serve`: requests over HTTP, adapters replaced under load, and a restart after a kill."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lora_hf.core.formatting import table
from lora_hf.core.records import read_json_record, record_files


def serving(results: Path) -> str:
    rows = []
    for file, record in _records(results):
        work = record["work"]
        name = f"[{_server(work)}, {work['adapters']} adapters](results/serving/{file.name})"
        for clients, side in ((1, record["one_at_a_time"]), (work["clients"], record["together"])):
            rows.append(
                [
                    name,
                    str(clients),
                    f"{side['requests']:,}",
                    f"{side['per_second']:.1f}",
                    f"{side['p50_ms']:.1f}",
                    f"{side['p99_ms']:.1f}",
                    str(side["errors"]),
                    str(side["wrong"]),
                    f"{record['ratio']:.2f}" if side is record["together"] else "1",
                ]
            )
    head = ["server (record)", "clients", "requests", "requests/s", "p50, ms", "p99, ms", "errors", "wrong results"]
    return table([*head, "speedup over one client"], rows)


def restarts(results: Path) -> str:
    rows = [
        [
            f"[{_server(record['work'])}](results/serving/{file.name})",
            f"{record['replaced']['times']}",
            f"{record['replaced']['failed']}",
            f"{statistics.median_low(record['replaced']['milliseconds']):.0f}",
            f"{record['started_in_seconds']:.1f}",
            f"{record['started_again_in_seconds']:.1f}",
            f"{record['after_the_restart']['wrong']}",
        ]
        for file, record in _records(results)
    ]
    head = ["server (record)", "adapters replaced", "failed", "median, ms", "start, s", "restart after a kill, s"]
    return table([*head, "wrong results after restart"], rows)


def _server(work: dict[str, Any]) -> str:
    return f"{work['model']}{' (random weights)' if work['init'] == 'random' else ''} in {work['precision']}"


def _records(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [(file, read_json_record(file)) for file in record_files(results / "serving")]
