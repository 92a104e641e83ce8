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
            *(f"{record['memory'][key]:.0f}" for key in ("base_mib", "without_models_mib", "before_mib", "after_mib")),
        ]
        for file, record in _records(results)
    ]
    head = ["server (record)", "adapters replaced", "failed", "median, ms", "start, s", "restart after a kill, s"]
    memory = ["base, MiB", "libraries, MiB", "server before, MiB", "after all requests, MiB"]
    return table([*head, "wrong results after restart", *memory], rows)


def text_forms(results: Path) -> str:
    rows = [
        [
            f"[{name}](results/text-forms/{file.name})",
            f"{side['base_mib']:.0f}",
            f"{side['mean_difference']:.1e}",
            f"{side['largest_difference']:.1e}",
            f"{side['same_next_token']:.1%}",
            f"{side['equal_texts']:.0%}",
        ]
        for file in record_files(results / "text-forms")
        for name, side in read_json_record(file)["forms"].items()
    ]
    head = ["base (record)", "base, MiB", "mean difference", "largest difference", "same next token", "equal texts"]
    return table(head, rows)


def streamed_texts(results: Path) -> str:
    rows = []
    for file in record_files(results / "serving-texts"):
        record = read_json_record(file)
        work, peer = record["work"], record["transformers_serve"]
        name = f"[{work['model']} in {work['precision']}](results/serving-texts/{file.name})"
        own_mib = record["memory"]["after_mib"]
        parts = [
            ("lora_hf, one adapter", 1, record["alone"], own_mib),
            ("lora_hf, one adapter", work["clients"], record["one_adapter"], own_mib),
            ("lora_hf, two adapters", work["clients"], record["two_adapters"], own_mib),
        ]
        if "alone" in peer:
            parts.append(("transformers serve, base alone", 1, peer["alone"], peer["memory_mib"]))
            parts.append(("transformers serve, base alone", work["clients"], peer["together"], peer["memory_mib"]))
        rows += [
            [
                name,
                server,
                str(clients),
                f"{part['tokens_per_second']:.1f}",
                f"{part['first_token_p50_ms']:.0f}",
                f"{part['first_token_p99_ms']:.0f}",
                str(part["errors"]),
                f"{mib:.0f}",
            ]
            for server, clients, part, mib in parts
        ]
    head = ["model (record)", "server", "clients", "tokens/s", "first token p50, ms", "first token p99, ms", "errors"]
    return table([*head, "memory at the end, MiB"], rows)


def _server(work: dict[str, Any]) -> str:
    return f"{work['model']}{' (random weights)' if work['init'] == 'random' else ''} in {work['precision']}"


def _records(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [(file, read_json_record(file)) for file in record_files(results / "serving")]
