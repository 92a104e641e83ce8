"""LoRA against full fine-tuning by rank, targets, rows and batch size, each at its best learning rate.

`python -m tools.tables.regret` draws the pictures from the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from lora_hf.core.formatting import percent, table
from lora_hf.core.records import SweepRecord, method_label, record_files
from lora_hf.experiments.plots import load_pyplot, save, series_style
from lora_hf.experiments.suite.tables import metric_label
from lora_hf.experiments.sweep.lr_find import format_rate
from lora_hf.experiments.sweep.space import RANK, RATE

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STANDARD_BATCH = 32


@dataclass(frozen=True)
class Curve:
    """The trials of one setting, with the learning rates as their only difference.

    Attributes:
        name: the method with targets and rank.
        targets: of LoRA; none for full fine-tuning.
        rank: 0 for full fine-tuning.
        rows: that each trial reads, each once.
    """

    name: str
    targets: tuple[str, ...]
    rank: int
    rows: int
    batch_size: int
    trials: tuple[dict[str, Any], ...]
    file: str

    @property
    def best(self) -> dict[str, Any]:
        """The trial with the lowest evaluation loss."""
        return min(self.trials, key=lambda trial: trial["loss"])

    @property
    def best_rate(self) -> float:
        return self.best["values"][RATE]


def curves(results: Path) -> list[Curve]:
    """Every setting in the records of `results/regret`; trials that diverged are left out."""
    found = []
    for file in record_files(results / "regret"):
        record = SweepRecord.load(file)
        train, lora = record.config["train"], record.config["lora"]
        full, batch_size = train["method"] == "full", train["batch_size"]
        targets = () if full else tuple(lora["targets"])
        complete = [trial for trial in record.trials if trial["state"] == "complete"]
        for rank in sorted({0 if full else trial["values"].get(RANK, lora["r"]) for trial in complete}):
            own = [trial for trial in complete if full or trial["values"].get(RANK, lora["r"]) == rank]
            own.sort(key=lambda trial: trial["values"][RATE])
            name, rows = method_label(train["method"], lora | {"r": rank}), train["max_steps"] * batch_size
            found.append(Curve(name, targets, rank, rows, batch_size, tuple(own), file.name))
    return found


def by_rank(results: Path) -> str:
    """Loss, accuracy and best rate of each setting, for each number of rows."""
    standard = [curve for curve in curves(results) if curve.batch_size == STANDARD_BATCH]
    sizes = sorted({curve.rows for curve in standard})
    rows = []
    for name in dict.fromkeys(curve.name for curve in sorted(standard, key=lambda curve: (curve.targets, curve.rank))):
        row = [name]
        for size in sizes:
            own = [curve for curve in standard if (curve.name, curve.rows) == (name, size)]
            row += _cells(own[0]) if own else ["-", "-", "-"]
        rows.append(row)
    head = ["method"]
    for size in sizes:
        head += [f"{size:,} rows: loss", "accuracy, %", "best lr"]
    return table(head, rows)


def by_batch_size(results: Path) -> str:
    """The same for batch sizes, with equal rows."""
    found = curves(results)
    compared = [curve for curve in found if curve.batch_size != STANDARD_BATCH]
    keys = {(curve.name, curve.rows) for curve in compared}
    chosen = [curve for curve in found if (curve.name, curve.rows) in keys]
    chosen.sort(key=lambda curve: (curve.batch_size, curve.rank))
    rows = [[str(curve.batch_size), curve.name, *_cells(curve)] for curve in chosen]
    return table(["batch size", "method", "loss", "accuracy, %", "best lr"], rows, text_columns=2)


def rate_ratios(results: Path) -> str:
    """For each kind of targets, the best rate of LoRA relative to that of full fine-tuning."""
    found = curves(results)
    full = {(curve.rows, curve.batch_size): curve.best_rate for curve in found if not curve.rank}
    ratios: dict[str, list[float]] = {}
    for curve in found:
        key = (curve.rows, curve.batch_size)
        if curve.rank and key in full:
            ratios.setdefault(", ".join(curve.targets), []).append(curve.best_rate / full[key])
    rows = [
        [f"LoRA on {targets}", len(own), f"{min(own):.0f}", f"{median_low(own):.0f}", f"{max(own):.0f}"]
        for targets, own in ratios.items()
    ]
    return table(["best lr / best lr of full fine-tuning", "settings", "lowest", "median", "highest"], rows)


def found_rates(results: Path) -> str:
    """The rate that `lr-find` chose for each task and method."""
    rows = []
    for file in record_files(results / "minilm"):
        record = SweepRecord.load(file)
        train, lora = record.config["train"], record.config["lora"]
        seconds = sum(trial["cpu_seconds"] for trial in record.trials)
        rows.append(
            [
                record.task,
                f"[{method_label(train['method'], lora)}](results/minilm/{file.name})",
                f"{len(record.trials)}",
                format_rate(record.best["values"][RATE]),
                f"{metric_label(record.metric)} {percent(record.best['score'])}",
                f"{sum(trial['steps'] for trial in record.trials):,}",
                f"{seconds / 60:.1f}",
            ]
        )
    head = [
        "task",
        "method (record)",
        "rates",
        "lr that lr-find chose",
        "score, %",
        "steps of all rates",
        "CPU minutes",
    ]
    return table(head, rows, text_columns=2)


def _cells(curve: Curve) -> list[str]:
    best = curve.best
    return [
        f"[{best['loss']:.3f}](results/regret/{curve.file})",
        percent(best["score"]),
        format_rate(curve.best_rate),
    ]


def draw(results: Path) -> list[Path]:
    """Writes the pictures beside the records and returns their paths."""
    standard = [curve for curve in curves(results) if curve.batch_size == STANDARD_BATCH]
    return [_draw_rates(standard, results / "regret"), _draw_ranks(standard, results / "regret")]


def _draw_rates(standard: Sequence[Curve], folder: Path) -> Path:
    """The loss against the learning rate, a panel for each kind of targets, with the most rows."""
    most = max(curve.rows for curve in standard)
    kinds = sorted({curve.targets for curve in standard if curve.rank})
    figure, panels = load_pyplot().subplots(1, len(kinds), figsize=(5 * len(kinds), 4.4), sharey=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        shown = [curve for curve in standard if curve.rows == most and curve.targets in (kind, ())]
        for index, curve in enumerate(sorted(shown, key=lambda curve: curve.rank)):
            points = [(trial["values"][RATE], trial["loss"]) for trial in curve.trials]
            style = series_style(index) | ({} if curve.rank else {"color": "black", "linestyle": "--"})
            axes.plot(*zip(*points, strict=True), **style, label=f"r={curve.rank}" if curve.rank else curve.name)
        axes.set(xscale="log", xlabel="learning rate", title=f"{', '.join(kind)}, {most:,} rows")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation loss")
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    return save(figure, folder / "learning-rate.png")


def _draw_ranks(standard: Sequence[Curve], folder: Path) -> Path:
    """The loss at the best learning rate against the rank; full fine-tuning as a line across."""
    sizes = sorted({curve.rows for curve in standard})
    figure, panels = load_pyplot().subplots(1, len(sizes), figsize=(5 * len(sizes), 4.4), squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        shown = [curve for curve in standard if curve.rows == size]
        for index, kind in enumerate(sorted({curve.targets for curve in shown if curve.rank})):
            points = sorted((curve.rank, curve.best["loss"]) for curve in shown if curve.targets == kind)
            axes.plot(*zip(*points, strict=True), **series_style(index), label=", ".join(kind))
        for curve in shown:
            if not curve.rank:
                axes.axhline(curve.best["loss"], color="black", linestyle="--", label=curve.name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rank", title=f"{size:,} rows")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation loss at the best learning rate")
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    return save(figure, folder / "rank.png")


if __name__ == "__main__":
    for path in draw(RESULTS):
        print(path.relative_to(RESULTS.parents[1]))
