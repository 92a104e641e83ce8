"""The table of `lr-find` against full runs of the same rates."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from lora_hf.core.formatting import table
from lora_hf.core.records import SweepRecord, record_files
from lora_hf.experiments.sweep.lr_find import format_rate

FULL, FOUND = "-full", "-halving"


def lr_find(results: Path) -> str:
    """A row for each workload: `NAME-halving.json` is ours, `NAME-full*.json` are full runs, a file for each seed."""
    folder = results / "sweep" / "lr-find"
    rows = []
    for file in record_files(folder):
        if not file.stem.endswith(FOUND):
            continue
        name, found = file.stem.removesuffix(FOUND), SweepRecord.load(file)
        full, train = SweepRecord.load(folder / f"{name}{FULL}.json"), found.config["train"]
        seeds = [full, *(SweepRecord.load(other) for other in sorted(folder.glob(f"{name}{FULL}-*.json")))]
        best, chosen = full.best["values"]["train.lr"], found.best["values"]["train.lr"]
        links = f"[lr-find](results/sweep/lr-find/{file.name}), [full](results/sweep/lr-find/{name}{FULL}.json)"
        rows.append(
            [
                f"{found.task}, batch size {train['batch_size']} ({links})",
                f"{format_rate(best)}: {_scores(seeds, best)}",
                f"{format_rate(chosen)}: {_scores(seeds, chosen)}",
                *(f"{sum(trial['steps'] for trial in record.trials):,}" for record in (full, found)),
                *(f"{_seconds(record):,.0f}" for record in (full, found)),
                f"{_seconds(full) / _seconds(found):.1f}",
            ]
        )
    head = ["workload (records)", "best rate in full: score", "rate of lr-find: its score in full", "steps, full"]
    return table([*head, "steps, lr-find", "CPU s, full", "CPU s, lr-find", "speedup"], rows)


def _scores(seeds: list[SweepRecord], rate: float) -> str:
    """The mean score of a rate over the seeds that tried it, and the range."""
    trials = [trial for record in seeds for trial in record.trials if trial["values"]["train.lr"] == rate]
    scores = [trial["score"] for trial in trials if trial["score"] is not None]
    spread = f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""
    return f"{fmean(scores):.3f}{spread}"


def _seconds(record: SweepRecord) -> float:
    return sum(trial["cpu_seconds"] for trial in record.trials)
