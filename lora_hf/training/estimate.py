"""Estimates the time and memory of a training from its first steps."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from lora_hf.core.formatting import duration
from lora_hf.core.provenance import peak_rss
from lora_hf.data.overview import DataOverview, SplitOverview

if TYPE_CHECKING:
    from lora_hf.training.trainer import RunTrainer

UNTIMED, TIMED = 1, 5  # the first step also allocates
FORWARD = 1 / 3  # a forward pass takes about a third of a training step
OPTIMIZER = 3  # numbers beside each trained one: its gradient, and AdamW's two averages


@dataclass
class Estimate:
    """Seconds of training, including evaluations, and bytes of memory by part. The parts add up to the peak.

    Memory means that of the GPU if there is one, otherwise that of the process.
    """

    seconds: float
    memory: dict[str, int]

    def line(self) -> str:
        """Returns the estimate for a terminal."""
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in self.memory.items())
        total = sum(self.memory.values()) / 1e9
        return f"training takes about {duration(self.seconds)} and {total:.2f} GB ({parts})"

    def compared(self, seconds: float, peak: int) -> dict[str, Any]:
        """Returns the estimate and its ratios to the actual run: 1 is exact; 2 means the run took twice as much."""
        ratios = {"seconds_ratio": seconds / self.seconds, "memory_ratio": peak / sum(self.memory.values())}
        return asdict(self) | ratios


class Estimator(TrainerCallback):
    """Times the first steps of a training. Until they are done, `estimate` is None.

    Args:
        stop: end the training after these steps.
    """

    def __init__(self, trainer: RunTrainer, data: DataOverview, train_split: str, stop: bool = False) -> None:
        self.trainer, self.stop = trainer, stop
        self.training: SplitOverview = data.splits[train_split]
        self.evaluation = sum(split.tokens for name, split in data.splits.items() if name != train_split)
        self.evaluates = trainer.args.eval_strategy
        self.steps: list[tuple[float, int, int]] = []  # of each: seconds, tokens, and tokens with padding
        self.started, self.resident = 0.0, 0
        self.estimate: Estimate | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resident = memory_now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.estimate is None:
            self.trainer.batch_sizes = []
            self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.estimate is not None or not self.trainer.batch_sizes:
            return
        tokens, padded = map(sum, zip(*self.trainer.batch_sizes, strict=True))
        self.steps.append((time.monotonic() - self.started, tokens, padded))
        if len(self.steps) < UNTIMED + TIMED and state.global_step < state.max_steps:
            return
        self.trainer.batch_sizes = None
        self.estimate = Estimate(self._seconds(args, state), self._memory(args, kwargs["model"]))
        control.should_training_stop = control.should_training_stop or self.stop

    def _seconds(self, args: Any, state: Any) -> float:
        per_token = median(seconds / tokens for seconds, tokens, _ in self.steps[UNTIMED:] or self.steps)
        rows: Any = self.trainer.train_dataset
        per_step = args.train_batch_size * args.gradient_accumulation_steps
        epochs = state.max_steps * per_step * args.world_size / len(rows)
        evaluations = {
            IntervalStrategy.NO: 0,
            IntervalStrategy.EPOCH: max(round(epochs), 1),
            IntervalStrategy.STEPS: state.max_steps / (state.eval_steps or state.max_steps),
        }[IntervalStrategy(self.evaluates)]
        tokens = epochs * self.training.tokens + evaluations * FORWARD * self.evaluation
        return per_token * tokens / args.world_size

    def _memory(self, args: Any, model: torch.nn.Module) -> dict[str, int]:
        trained = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
        weights = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
        measured = max(memory_peak() - self.resident - OPTIMIZER * trained, 0)
        # The largest batch holds the longest row, to which the others are padded.
        largest = max(padded for _, _, padded in self.steps) / args.gradient_accumulation_steps
        longest = min(self.training.lengths["longest"], self.training.limit) * args.train_batch_size
        return {
            "weights": weights,
            "gradients and optimizer": OPTIMIZER * trained,
            "activations": round(measured * max(1.0, longest / largest)),
            "program and libraries": max(self.resident - weights, 0),
        }


def memory_now() -> int:
    """Returns the bytes that are in use on the GPU or, without one, in the process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def memory_peak() -> int:
    """Returns the peak of `memory_now`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()
