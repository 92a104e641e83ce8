"""The picture of a run: training loss and development scores against the epoch."""

from __future__ import annotations

from pathlib import Path

from lora_hf.core.records import RunRecord


def draw_curves(record: RunRecord, path: Path) -> None:
    """Writes `curves.png` from the record's history."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    figure.subplots_adjust(0.06, 0.13, 0.98, 0.84, wspace=0.14)  # matplotlib's own layout draws everything twice
    steps = [entry for entry in record.history if "loss" in entry]
    left.plot([entry["epoch"] for entry in steps], [entry["loss"] for entry in steps], label="training")
    for split, scores in record.metrics.items():
        at = [entry for entry in record.history if f"eval_{split}_loss" in entry]
        epochs = [entry["epoch"] for entry in at]
        left.plot(epochs, [entry[f"eval_{split}_loss"] for entry in at], marker="o", label=split)
        for metric in scores:
            values = [entry[f"eval_{split}_{metric}"] for entry in at]
            label = metric if len(record.metrics) == 1 else f"{metric}, {split}"
            (line,) = right.plot(epochs, values, marker="o", label=label)
            majority = record.majority.get(split, {}).get(metric)
            if majority is not None:
                right.axhline(majority, color=line.get_color(), linestyle=":", label=f"{label}, always one answer")
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    right.set(xlabel="epoch", title="Development scores")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{record.task}, {record.model}, {record.method}, seed {record.seed}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
