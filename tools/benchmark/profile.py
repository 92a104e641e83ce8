"""Where the time of our training step goes: the operators of a round, by what they are for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.provenance import git_state, versions
from lora_hf.lora.precision import resolve_precision
from tools.benchmark.sides import SIDES, Setup
from tools.benchmark.train import machine_in_use, work_rows
from tools.benchmark.work import OURS, Work

NARROW = 3  # a product with a side of at most `NARROW * r` is one of LoRA's: q, k and v of a fused projection have 3 r

# The first word that an operator's name contains tells what it is for.
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


class _Watched(TrainerCallback):
    """The profiler around the second epoch; the first warms up."""

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
    """The share of the round's time by purpose, largest first; what no operator accounts for is `between operators`.

    An operator's time is that on the thread that calls it, on a CPU the time until it is done.

    Raises:
        ConfigError: on a GPU, whose operators end after they are called.
    """
    if torch.cuda.is_available():
        raise ConfigError(
            "benchmark profile: it reads the times of a CPU; on a GPU use torch's profiler and its traces"
        )
    config = replace(config, model=replace(config.model, precision=resolve_precision(config.model.precision)))
    rows = work_rows(config, steps)
    watched = _Watched()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.of(Work(OURS, config.to_dict(), rows, 2, 0.0), Path(folder))
        trainer = SIDES[OURS](setup)
        trainer.add_callback(watched)
        trainer.train()
        model: Any = trainer.model
    found: dict[str, float] = {}
    for event in watched.profiler.key_averages(group_by_input_shape=True):
        purpose = _purpose(event.key, event.input_shapes or [], NARROW * config.lora.r, model.config.vocab_size)
        found[purpose] = found.get(purpose, 0.0) + event.self_cpu_time_total / 1e6
    found["between operators"] = max(0.0, watched.seconds - sum(found.values()))
    shares = {purpose: seconds / watched.seconds for purpose, seconds in sorted(found.items(), key=lambda p: -p[1])}
    return {
        "work": {
            "model": Path(config.model.name).name,
            "task": config.task.name,
            "batch_size": config.train.batch_size,
            "steps": steps,
            "tokens": sum(sum(row["attention_mask"]) for row in rows),
            "group_by_prompt": config.train.group_by_prompt,
            "lora": config.to_dict()["lora"],
            "precision": config.model.precision,
        },
        "seconds": watched.seconds,
        "shares": shares,
        "machine": machine_in_use(),
        "versions": versions(),
        "git": git_state(),
    }


def _purpose(name: str, shapes: Sequence[Any], narrow: int, vocabulary: int) -> str:
    sides = [side for shape in shapes for side in shape if isinstance(side, int)]
    if vocabulary in sides:
        return "head of the language model"
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        matrices = [shape for shape in shapes if len(shape) == 2]
        narrowest = min((side for shape in matrices for side in shape), default=0)
        return "low-rank products" if narrowest <= narrow else "products with frozen weights"
    for word, purpose in PURPOSES.items():
        if word in name:
            return purpose
    return "other operators"
