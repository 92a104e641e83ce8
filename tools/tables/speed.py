"""The tables of what `benchmark` measured: training, answering, and where a step's time goes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lora_hf.core.formatting import percent, table
from lora_hf.core.records import read_json_record, record_files

PEERS = {"peft-default": "PEFT as it comes", "peft-best": "PEFT at its best", "loralib": "loralib"}


def speed(results: Path) -> str:
    """A row for each side of each record."""
    rows = []
    for file, record in _records(results / "speed"):
        for side, measured in record["sides"].items():
            ratio, memory = record["ratios"].get(f"lora/{side}"), record["memory_ratios"].get(f"lora/{side}")
            rows.append(
                [
                    f"[{_work(record)}](results/speed/{file.name})",
                    side,
                    _spread(measured["examples_per_second"], 1),
                    f"{measured['tokens_per_second']['median']:,.0f}",
                    percent(measured["share_of_peak"]["median"]),
                    _spread(ratio, 2) if ratio else "1",
                    f"{(measured['memory']['above_base'] or 0) / 1e6:,.0f}",
                    f"{memory:.2f}" if memory else "1",
                ]
            )
    head = ["work (record)", "side", "examples/s", "tokens/s", "share of peak, %", "lora is faster, x"]
    return table([*head, "memory above base, MB", "lora needs, x"], rows, text_columns=2)


def equal_work(results: Path) -> str:
    """Full fine-tuning against LoRA on the same rows: how much more it multiplies, and how much longer it takes."""
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
    head = ["work (record)", "operations, full over LoRA", "time, full over PEFT", "time, full over lora_hf"]
    return table([*head, "of it not from operations"], rows)


def _against(sides: dict[str, Any], slower: str, faster: str) -> float:
    """The median over the rounds of how many times as long one side took as the other."""
    pairs = zip(sides[slower]["seconds"], sides[faster]["seconds"], strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def speed_machines(results: Path) -> str:
    """The machines of these records and their measured peaks."""
    peaks: dict[str, list[float]] = {}
    for _, record in _records(results / "speed"):
        peaks.setdefault(_machine(record), []).append(record["peak"]["bf16_flops_per_second"]["median"])
    rows = [
        [machine, f"{min(values) / 1e12:.2f} to {max(values) / 1e12:.2f}", str(len(values))]
        for machine, values in peaks.items()
    ]
    return table(["machine", "bf16 peak, TFLOP/s", "records"], rows)


def profiles(results: Path) -> str:
    """The shares of a step's time by purpose, a column for each record."""
    found = _records(results / "profile")
    purposes = dict.fromkeys(purpose for _, record in found for purpose in record["shares"])
    largest = {purpose: max(record["shares"].get(purpose, 0.0) for _, record in found) for purpose in purposes}
    rows = [
        [purpose, *(percent(record["shares"].get(purpose, 0.0)) for _, record in found)]
        for purpose in sorted(purposes, key=lambda each: -largest[each])
    ]
    head = [f"[{_work(record)}](results/profile/{file.name}), %" for file, record in found]
    return table(["the time goes to", *head], rows)


def answering(results: Path) -> str:
    """A row for each side of each record of `benchmark infer`."""
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
    return table(["work (record)", "side", "rows/s", "mixed is faster, x"], rows, text_columns=2)


def switching(results: Path) -> str:
    """How long it takes to make another adapter the active one."""
    rows = [
        [f"[{record['work']['model']}](results/infer/{file.name})", f"{1e6 * seconds:.1f}"]
        for file, record in _records(results / "infer")
        if (seconds := record["sides"]["mixed"]["switch_seconds"])
    ]
    return table(["model (record)", "a switch, microseconds"], rows)


def peers(results: Path) -> str:
    """How many times as fast as each other library we train, and the share of its memory; medians of the rounds."""
    rows = []
    for _, record in _records(results / "speed"):
        ratios, memory = record["ratios"], record["memory_ratios"]
        if "lora/peft-default" not in ratios:
            continue
        row = [_work(record)]
        for side in PEERS:
            faster, needs = ratios.get(f"lora/{side}"), memory.get(f"lora/{side}")
            row.append(f"{faster['median']:.1f} x speed, {needs:.2f} x memory" if faster and needs else "-")
        rows.append(row)
    return table(["training", *(f"beside {name}" for name in PEERS.values())], rows)


def joint(results: Path) -> str:
    """A row for each record of `benchmark joint`: runs together on one base against one after another."""
    rows = []
    for file, record in _records(results / "joint"):
        work, sides = record["work"], record["sides"]
        lora = f"r={work['lora']['r']} on {' '.join(work['lora']['targets'])}"
        tasks = dict.fromkeys(name.rpartition("-seed")[0] for name in work["runs"])
        rows.append(
            [
                f"[{work['model']} in {work['precision']}, {lora}](results/joint/{file.name})",
                f"{len(work['runs'])}: {', '.join(tasks)}",
                f"{work['steps']} of {work['batch_size']} rows",
                *(_spread(sides[side]["examples_per_second"], 1) for side in ("together", "apart")),
                _spread(record["ratios"]["together/apart"], 2),
                *(f"{sides[side]['rss']['median'] / 1e6:,.0f}" for side in ("together", "apart")),
                f"{max(each['difference'] for each in record['weights_apart'].values()):.2g}",
            ]
        )
    head = ["work (record)", "runs", "steps each", "together, examples/s", "one by one, examples/s", "faster, x"]
    return table([*head, "together, peak MB", "one by one, peak MB", "weights apart by at most"], rows)


def quantised(results: Path) -> str:
    """How the base is held: its size, the speed and memory of training, and the score."""
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
    head = ["base held in (record)", "base, MB", "examples/s", "memory above base, MB", "accuracy, %"]
    return table([*head, "merged, %", "rounded away of the delta, %"], rows)


def answers_in(results: Path) -> str:
    """One trained adapter, answering in several precisions."""
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
    return table(["answers in (record)", "accuracy, %", "logits moved by, %", "examples/s"], rows)


def _records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [(file, read_json_record(file)) for file in record_files(folder)]


def _work(record: dict[str, Any]) -> str:
    work = record["work"]
    words = [f"{work['model']}, {work['task']}"]
    words += ["grouped by prompt"] if work.get("group_by_prompt") else []
    words += [f"dropout {work['lora']['lora_dropout']:g}"] if work["lora"]["lora_dropout"] else []
    return f"{', '.join(words)}, {_machine(record).split('(')[0].split()[0]}"


def _machine(record: dict[str, Any]) -> str:
    return f"{record['machine']['processor']}, {record['machine']['cores']} cores"


def _spread(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"
