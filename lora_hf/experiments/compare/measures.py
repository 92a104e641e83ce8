"""What a comparison computes from records: spreads, curves, time to a quality, memory by part, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_hf.core.records import RunRecord
from lora_hf.experiments.compare.runs import FinishedRun

MASTER_BYTES = 4  # what is trained, and its gradient, is held in fp32
ADAMW_BYTES = 8  # two moments in fp32
FROZEN_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def curves(run: FinishedRun) -> dict[str, Any]:
    """The training loss and the score of the compared split, as pairs of step and value."""
    name = f"eval_{run.split}_{run.task.best_metric}"
    history = run.record.history
    return {
        "seed": run.record.seed,
        "loss": [[entry["step"], entry["loss"]] for entry in history if {"step", "loss"} <= entry.keys()],
        "score": [[entry["step"], entry[name]] for entry in history if {"step", name} <= entry.keys()],
    }


def best_evaluation(run: FinishedRun) -> float:
    """The best score of its evaluations during training."""
    values = [value for _, value in curves(run)["score"]] or [run.score]
    return max(values) if run.task.greater_is_better else min(values)


def time_to(run: FinishedRun, quality: float) -> float | None:
    """Seconds of training up to the first evaluation with that quality; None where it is never reached.

    A record has the time of the whole training, evaluations included; it is shared out evenly over the steps.
    """
    steps = max((entry.get("step", 0) for entry in run.record.history), default=0)
    for step, value in curves(run)["score"]:
        if value >= quality if run.task.greater_is_better else value <= quality:
            return run.record.timings["train"] * step / steps
    return None


def peak_memory(record: RunRecord) -> int:
    """The peak in bytes: of the tensors on the GPU where there is one, else of the process."""
    return record.memory["cuda"] or record.memory["rss"]


def memory_parts(record: RunRecord) -> dict[str, int]:
    """The peak in bytes by part; all but the last is computed from counts of parameters, the last is what remains.

    Frozen weights take the bytes of the base's precision, what is trained 4 bytes a parameter, its gradient as many and
    AdamW's two moments 8. Of a packed base, or with another optimiser, that part is not known and stays in the rest.
    """
    model, train = record.config["model"], record.config["train"]
    trained, frozen = record.parameters["trainable"], record.parameters["total"] - record.parameters["trainable"]
    parts = {
        "frozen weights": 0 if model["quantised"] else frozen * FROZEN_BYTES[model["precision"]],
        "trained weights": trained * MASTER_BYTES,
        "gradients": trained * MASTER_BYTES,
        "AdamW's moments": 0 if "optim" in train["hf"] else trained * ADAMW_BYTES,
    }
    return parts | {"activations, workspace, libraries": max(0, peak_memory(record) - sum(parts.values()))}


def pareto(costs: Sequence[float], values: Sequence[float], greater_is_better: bool) -> list[bool]:
    """Which points no other one beats: none is at most as costly and at least as good, and better in one of them."""
    signed = values if greater_is_better else [-value for value in values]
    points = list(zip(costs, signed, strict=True))
    return [
        not any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)
        for point in points
    ]
