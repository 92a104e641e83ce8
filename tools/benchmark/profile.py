"""`profile`: where the time of a LoRA training step goes, by the purpose of its operators."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from tools.benchmark.job import OURS, Job
from tools.benchmark.rounds import environment, with_resolved_precision
from tools.benchmark.rows import count_tokens, training_rows
from tools.benchmark.train_sides import SIDES, Setup

# A product with a dimension of at most `NARROW * r` is one of LoRA: a fused projection adapts q, k and v with 3 r.
NARROW = 3

# The purpose of an operator is that of the first of these words in its name. The purposes are keys of the record.
PURPOSES = {
    "bmm": "attention",
    "softmax": "attention",
    "masked_fill": "attention",
    "index_": "attention",
    "random_": "dropout",
    "clamp": "dropout",
    "adam": "optimiser",
    "foreach": "optimiser",
    "norm": "activations and norms",
    "gelu": "activations and norms",
    "copy": "copies and casts",
    "cat": "copies and casts",
    "LoraLinear": "Python of the projections",
    "GroupedRows": "Python of the attention",
}


class _ProfileCallback(TrainerCallback):
    """Profiles the second epoch; the first one is a warm-up."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.seconds = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.profiler.start()
            self.seconds = -time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds:
            self.seconds += time.perf_counter()
            self.profiler.stop()


def profile_train(config: RunConfig, steps: int = 10) -> dict[str, Any]:
    """Profiles a round of `steps` optimizer steps, and returns the record.

    Returns:
        The share of the time for each purpose, largest first. `between operators` is the time outside of operators.
        The time of an operator is measured on the thread that calls it.

    Raises:
        ConfigError: on a GPU, where operators return before they have finished.
    """
    if torch.cuda.is_available():
        raise ConfigError(
            "benchmark profile: operators can only be timed on a CPU; on a GPU, use the traces of torch.profiler"
        )
    config = with_resolved_precision(config)
    rows = training_rows(config, steps)
    callback = _ProfileCallback()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.from_job(Job(OURS, config.to_dict(), rows, rounds=2), Path(folder))
        trainer = SIDES[OURS](setup)
        trainer.remove_callback(PrinterCallback)  # it prints to standard output
        trainer.add_callback(callback)
        trainer.train()
        model: Any = trainer.model
    times: dict[str, float] = {}
    for event in callback.profiler.key_averages(group_by_input_shape=True):
        purpose = _purpose(event.key, event.input_shapes or [], NARROW * config.lora.r, model.config.vocab_size)
        times[purpose] = times.get(purpose, 0.0) + event.self_cpu_time_total / 1e6
    times["between operators"] = max(0.0, callback.seconds - sum(times.values()))
    shares = {
        purpose: seconds / callback.seconds for purpose, seconds in sorted(times.items(), key=lambda pair: -pair[1])
    }
    return {
        "work": {
            "model": Path(config.model.name).name,
            "task": config.task.name,
            "batch_size": config.train.batch_size,
            "steps": steps,
            "tokens": count_tokens(rows),
            "group_by_prompt": config.train.group_by_prompt,
            "lora": config.to_dict()["lora"],
            "precision": config.model.precision,
        },
        "seconds": callback.seconds,
        "shares": shares,
        **environment(),
    }


def _purpose(name: str, shapes: Sequence[Any], narrow: int, vocabulary: int) -> str:
    dimensions = [size for shape in shapes for size in shape if isinstance(size, int)]
    if vocabulary in dimensions:
        return "head of the language model"
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        matrices = [shape for shape in shapes if len(shape) == 2]
        narrowest = min((size for shape in matrices for size in shape), default=0)
        return "low-rank products" if narrowest <= narrow else "products with frozen weights"
    for word, purpose in PURPOSES.items():
        if word in name:
            return purpose
    return "other operators"
