"""Tables of `python -m tools.benchmark`: training and inference speed, profiles, quantized bases."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lora_hf.core.formatting import percent, table
from lora_hf.core.records import read_json_record, record_files
from tools.benchmark.job import PRODUCTS

PEERS = {"peft-default": "PEFT (defaults)", "peft-best": "PEFT (best settings)", "loralib": "loralib"}
USUAL_BATCH = {"e2e_nlg": 8}  # 16 for the tasks of GLUE; a row of a table names another batch size
# Row labels of a profile, by the names in its record.
OPERATIONS = {
    "head of the language model": "language model head",
    "products with frozen weights": "matmuls with frozen weights",
    "low-rank products": "LoRA matmuls",
    "other operators": "other operators",
    "between operators": "time between operators",
    "Python of the projections": "Python overhead of LoRA layers",
    "Python of the attention": "Python overhead of attention",
    "copies and casts": "copies and casts",
    "activations and norms": "activations and norms",
    "optimiser": "optimizer",
}


def speed(results: Path) -> str:
    rows = []
    for file, record in _records(results / "speed"):
        for side, measured in record["sides"].items():
            ratio, memory = record["ratios"].get(f"lora/{side}"), record["memory_ratios"].get(f"lora/{side}")
            above_base = measured["memory"]["above_base"]
            rows.append(
                [
                    f"[{_work(record)}](results/speed/{file.name})",
                    side,
                    _spread(measured["examples_per_second"], 1),
                    f"{measured['tokens_per_second']['median']:,.0f}",
                    percent(measured["share_of_peak"]["median"]),
                    _spread(ratio, 2) if ratio else "1",
                    f"{above_base / 1e6:,.0f}" if above_base else "",
                    f"{memory:.2f}" if memory else "1" if side == "lora" else "",
                ]
            )
    head = ["workload (record)", "implementation", "examples/s", "tokens/s", "share of peak, %", "lora speedup"]
    return table([*head, "memory above base, MB", "lora memory ratio"], rows, text_columns=2)


def equal_work(results: Path) -> str:
    """The ratios of FLOPs and of time between full fine-tuning and LoRA on the same rows."""
    rows = []
    for file, record in _records(results / "speed"):
        sides = record["sides"]
        if "full" in sides:
            work = sides["full"]["flops"] / sides["lora"]["flops"]
            time = record["ratios"]["lora/full"]["median"]
            rows.append(
                [
                    f"[{_work(record)}](results/speed/{file.name})",
                    f"{work:.2f}",
                    f"{_against(sides, 'full', 'peft-best'):.2f}",
                    f"{time:.2f}",
                    f"{time / work:.2f}",
                ]
            )
    head = ["workload (record)", "FLOPs, full / LoRA", "time, full / PEFT", "time, full / lora_hf"]
    return table([*head, "not explained by FLOPs"], rows)


def roofline(results: Path) -> str:
    """How close a step comes to its matrix products alone, and how much faster than PEFT those would be."""
    rows = []
    for file, record in _records(results / "speed"):
        sides = record["sides"]
        if PRODUCTS in sides:
            rows.append(
                [
                    f"[{_work(record)}](results/speed/{file.name})",
                    _spread(sides[PRODUCTS]["examples_per_second"], 1),
                    *(percent(_against(sides, PRODUCTS, side)) for side in ("lora", "frozen", "peft-best")),
                    f"{_against(sides, 'peft-best', PRODUCTS):.2f}",
                ]
            )
    head = ["workload (record)", "products, examples/s", "lora, %", "frozen, %", "peft-best, %"]
    return table([*head, "limit of the speedup"], rows)


def _against(sides: dict[str, Any], slower: str, faster: str) -> float:
    """The median over rounds of the time ratio `slower / faster`."""
    pairs = zip(sides[slower]["seconds"], sides[faster]["seconds"], strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def speed_machines(results: Path) -> str:
    peaks: dict[str, list[float]] = {}
    for _, record in _records(results / "speed"):
        peaks.setdefault(_machine(record), []).append(_peak(record))
    rows = [
        [machine, f"{min(values) / 1e12:.2f} to {max(values) / 1e12:.2f}", str(len(values))]
        for machine, values in peaks.items()
    ]
    return table(["machine", "matmul peak, TFLOP/s", "records"], rows)


def profiles(results: Path) -> str:
    found = _records(results / "profile")
    purposes = dict.fromkeys(purpose for _, record in found for purpose in record["shares"])
    largest = {purpose: max(record["shares"].get(purpose, 0.0) for _, record in found) for purpose in purposes}
    rows = [
        [OPERATIONS.get(purpose, purpose), *(percent(record["shares"].get(purpose, 0.0)) for _, record in found)]
        for purpose in sorted(purposes, key=lambda each: -largest[each])
    ]
    head = [f"[{_work(record)}](results/profile/{file.name}), %" for file, record in found]
    return table(["operation", *head], rows)


def answering(results: Path) -> str:
    rows = []
    for file, record in _records(results / "infer"):
        lora = record["work"]["lora"]
        work = f"{record['work']['model']}, r={lora['r']} on {' '.join(lora['targets'])}"
        for side, measured in record["sides"].items():
            ratio = record["ratios"].get(f"mixed/{side}")
            rows.append(
                [
                    f"[{work}](results/infer/{file.name})",
                    side,
                    _spread(measured["rows_per_second"], 1),
                    _spread(ratio, 2) if ratio else "1",
                ]
            )
    return table(["workload (record)", "mode", "rows/s", "speedup of mixed"], rows, text_columns=2)


def switching(results: Path) -> str:
    rows = [
        [f"[{record['work']['model']}](results/infer/{file.name})", f"{1e6 * seconds:.1f}"]
        for file, record in _records(results / "infer")
        if (seconds := record["sides"]["mixed"]["switch_seconds"])
    ]
    return table(["model (record)", "switch, µs"], rows)


def peers(results: Path) -> str:
    """Our training speed and memory relative to each other library: medians over rounds."""
    rows = []
    for _, record in _records(results / "speed"):
        ratios, memory = record["ratios"], record["memory_ratios"]
        if "lora/peft-default" not in ratios:
            continue
        row = [_work(record)]
        for side in PEERS:
            faster, needs = ratios.get(f"lora/{side}"), memory.get(f"lora/{side}")
            row.append(f"{faster['median']:.1f}x speed, {needs:.2f}x memory" if faster and needs else "-")
        rows.append(row)
    return table(["workload", *(f"vs. {name}" for name in PEERS.values())], rows)


def quantised(results: Path) -> str:
    rows = []
    for file, record in _records(results / "quantised"):
        for form, measured in record["speed"].items():
            quality = record["quality"][form]
            merged = quality["merged"]
            rows.append(
                [
                    f"[{form}](results/quantised/{file.name})",
                    f"{measured['base_bytes'] / 1e6:,.0f}",
                    _spread(measured["examples_per_second"], 1),
                    f"{(measured['memory']['above_base'] or 0) / 1e6:,.0f}",
                    percent(quality["metrics"]["accuracy"]),
                    percent(merged["metrics"]["accuracy"]) if merged else "-",
                    percent(merged["drift"]["of_delta"]) if merged else "-",
                ]
            )
    head = ["base (record)", "base, MB", "examples/s", "memory above base, MB", "accuracy, %"]
    return table([*head, "accuracy after merging, %", "rounding error of merging, % of the update"], rows)


def answers_in(results: Path) -> str:
    rows = []
    for file, record in _records(results / "quantised"):
        for precision, measured in record["inference"]["precisions"].items():
            rows.append(
                [
                    f"[{precision}](results/quantised/{file.name})",
                    percent(measured["metrics"]["accuracy"]),
                    percent(measured["logits_moved"]),
                    f"{measured['examples_per_second']:,.0f}",
                ]
            )
    return table(["precision (record)", "accuracy, %", "change in logits, %", "examples/s"], rows)


def _records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [(file, read_json_record(file)) for file in record_files(folder)]


def _work(record: dict[str, Any]) -> str:
    work = record["work"]
    words = [f"{work['model']}, {work['task']}"]
    words += [f"batch {work['batch_size']}"] if work["batch_size"] != USUAL_BATCH.get(work["task"], 16) else []
    words += ["grouped by prompt"] if work.get("group_by_prompt") else []
    words += [f"dropout {work['lora']['lora_dropout']:g}"] if work["lora"]["lora_dropout"] else []
    words += [f"base dropout {work['base_dropout']:g}"] if work.get("base_dropout") else []
    return f"{', '.join(words)}, {_machine(record).split('(')[0].split()[0]}"


def _peak(record: dict[str, Any]) -> float:
    """The best rate of all precisions; records of machines that are fastest in bf16 once had that alone."""
    peak = record["peak"]
    return (peak.get("flops_per_second") or peak["bf16_flops_per_second"])["median"]


def _machine(record: dict[str, Any]) -> str:
    return f"{record['machine']['processor']}, {record['machine']['cores']} cores"


def _spread(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"
