"""One side in a process of its own: `python -m tools.benchmark.worker`.

It reads and writes lines of JSON. Input: the job, then one line for each round. It idles until the line arrives.
Output: `ready` once everything is built, `round` after each round, `done` at the end, or `error` for an invalid job.
Each side has a process of its own, so that its peak memory is its own. JSON is used because nothing may be pickled.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_hf.core.errors import UserError
from lora_hf.core.imports import heavy_imports
from tools.benchmark.job import PEAK, PRODUCTS, Job
from tools.benchmark.worker_process import Channel

with heavy_imports():
    import torch
    from torch import nn
    from transformers import Trainer, TrainerCallback

    from tools.benchmark.flops import FrozenProducts, matmul_peak, matrix_weights, step_flops, synchronize
    from tools.benchmark.infer_sides import SIDES as INFER_SIDES
    from tools.benchmark.infer_sides import build
    from tools.benchmark.memory import MemoryTracker
    from tools.benchmark.peers import PEER_SIDES
    from tools.benchmark.train_sides import FLOPS_PER_WEIGHT, SIDES, Setup


class RoundCallback(TrainerCallback):
    """Makes the Trainer wait before each epoch, times the epoch and tracks the memory.

    The time is that of the whole round: collating, copies, forward, backward, clipping, optimizer and schedule.
    """

    def __init__(self, channel: Channel, ready: dict[str, Any], trains_base: bool) -> None:
        self.channel, self.ready, self.trains_base = channel, ready, trains_base
        self.memory: MemoryTracker | None = None
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory = MemoryTracker(kwargs["model"], self.trains_base)
        self.channel.send(ready=self.ready)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.channel.receive()
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and self.memory:
            self.memory.add_gradients(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(args.device)
        self.channel.send(round={"seconds": time.perf_counter() - self.start})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.memory:
            self.channel.send(done={"memory": self.memory.summary(kwargs["optimizer"])})


def run(channel: Channel) -> None:
    """Runs the job of the first line, one round for each line after it."""
    job = Job.from_line(channel.receive())
    try:
        if job.side == PEAK:
            _measure_peak(channel, job)
        elif job.side == PRODUCTS:
            _multiply(channel, job)
        elif job.side in INFER_SIDES:
            _infer(channel, job)
        else:
            _train(channel, job)
    except UserError as error:
        channel.send(error=str(error))


def _train(channel: Channel, job: Job) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.from_job(job, Path(folder))
        weights = matrix_weights(setup.meta_base())
        trainer = (SIDES | PEER_SIDES)[job.side](setup)
        model: Any = trainer.model
        ready = {
            "flops": step_flops(weights, job.rows, FLOPS_PER_WEIGHT.get(job.side, 4)),
            "trained_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
            "setting": _setting(trainer, model),
        }
        trainer.add_callback(RoundCallback(channel, ready, trains_base=job.side == "full"))
        trainer.train()


def _multiply(channel: Channel, job: Job) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.from_job(job, Path(folder))
        model: Any = setup.base()
        model.to(_device())
        channel.send(ready={"flops": step_flops(matrix_weights(model), job.rows, 4), "trained_parameters": 0})
        _time_rounds(channel, job, FrozenProducts(model, job.rows, setup.config.train.batch_size))
        channel.send(done={"memory": {"above_base": None}})


def _infer(channel: Channel, job: Job) -> None:
    predict, extra_measurements = build(job)
    channel.send(ready={})
    _time_rounds(channel, job, predict)
    channel.send(done=extra_measurements())


def _time_rounds(channel: Channel, job: Job, run_round: Callable[[], Any]) -> None:
    for _ in range(job.rounds):
        channel.receive()
        start = time.perf_counter()
        run_round()
        synchronize(_device())
        channel.send(round={"seconds": time.perf_counter() - start})


def _setting(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """The precision and the order of rows of a side, read from the objects that run."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + parameter.numel()
    return {
        "trainer": type(trainer).__name__,
        "collator": type(trainer.data_collator).__name__,
        "weights": max(sizes, key=lambda dtype: sizes[dtype]),
        "autocast": "bfloat16" if trainer.args.bf16 else None,
        "rows": str(trainer.args.train_sampling_strategy),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure_peak(channel: Channel, job: Job) -> None:
    channel.send(ready={})
    for _ in range(job.rounds):
        channel.receive()
        channel.send(round={"rates": matmul_peak(_device(), job.peak_seconds)})
    channel.send(done={})


if __name__ == "__main__":
    run(Channel.standard())
