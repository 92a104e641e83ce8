"""One side in a process of its own: `python -m tools.benchmark.worker`.

It speaks JSON lines. In: the work, then a line for each round, which it waits for without working. Out: `ready` once
everything is built, `round` after each, `done` with its memory; `error` where a person made a mistake. A process a
side, so that a peak of memory is that side's alone; lines and not `multiprocessing`, because nothing here is pickled.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lora_hf.core.errors import UserError
from tools.benchmark.answering import ANSWERING, build
from tools.benchmark.flops import matmul_peak, matrix_weights, step_flops, synchronize
from tools.benchmark.memory import MemoryWatch
from tools.benchmark.peers import PEER_SIDES
from tools.benchmark.process import Channel
from tools.benchmark.sides import PER_WEIGHT, SIDES, Setup
from tools.benchmark.work import PEAK, Work


class Turns(TrainerCallback):
    """Makes a Trainer wait for its turn before each epoch, times the epoch and watches the memory.

    The time is the whole round: collating rows, copies, forward, backward, clipping, optimiser and schedule.
    """

    def __init__(self, channel: Channel, ready: dict[str, Any], trains_base: bool) -> None:
        self.channel, self.ready, self.trains_base = channel, ready, trains_base
        self.watch: MemoryWatch | None = None
        self.begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch = MemoryWatch(kwargs["model"], self.trains_base)
        self.channel.tell(ready=self.ready)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.channel.wait()
        self.begin = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and self.watch:
            self.watch.see_gradients(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(args.device)
        self.channel.tell(round={"seconds": time.perf_counter() - self.begin})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch:
            self.channel.tell(done={"memory": self.watch.parts(kwargs["optimizer"])})


def serve(channel: Channel) -> None:
    """Does the work that the first line says, a round for each line after it."""
    work = Work.from_line(channel.wait())
    try:
        if work.side == PEAK:
            _measure_peak(channel, work)
        elif work.side in ANSWERING:
            _answer(channel, work)
        else:
            _train(channel, work)
    except UserError as error:
        channel.tell(error=str(error))


def _train(channel: Channel, work: Work) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.of(work, Path(folder))
        weights = matrix_weights(setup.skeleton())
        trainer = (SIDES | PEER_SIDES)[work.side](setup)
        model: Any = trainer.model
        ready = {
            "flops": step_flops(weights, work.rows, PER_WEIGHT.get(work.side, 4)),
            "trained_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
            "setting": _setting(trainer, model),
        }
        trainer.add_callback(Turns(channel, ready, trains_base=work.side == "full"))
        trainer.train()


def _answer(channel: Channel, work: Work) -> None:
    answer, end = build(work)
    channel.tell(ready={})
    for _ in range(work.rounds):
        channel.wait()
        begin = time.perf_counter()
        answer()
        synchronize(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        channel.tell(round={"seconds": time.perf_counter() - begin})
    channel.tell(done=end())


def _setting(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """In what a side computes and in what order its rows come, read from what runs."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        kind = str(parameter.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    return {
        "trainer": type(trainer).__name__,
        "collator": type(trainer.data_collator).__name__,
        "weights": max(sizes, key=lambda kind: sizes[kind]),
        "autocast": "bfloat16" if trainer.args.bf16 else None,
        "rows": str(trainer.args.train_sampling_strategy),
    }


def _measure_peak(channel: Channel, work: Work) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channel.tell(ready={})
    for _ in range(work.rounds):
        channel.wait()
        channel.tell(round={"rates": matmul_peak(device, work.peak_seconds)})
    channel.tell(done={})


if __name__ == "__main__":
    serve(Channel.standard())
