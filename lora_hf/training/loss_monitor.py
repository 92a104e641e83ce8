"""Stops a run when the loss is NaN or infinite, and keeps the running mean for the log."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from lora_hf.core.errors import DivergedError
from lora_hf.training.checkpoints import newest_valid
from lora_hf.training.distributed import all_reduce_max, run_on_rank

MAX_UNCHECKED_LOSSES = 16  # on a GPU, where reading a loss waits for the device


class LossMonitor(TrainerCallback):
    """Watches the loss of every batch.

    Raises:
        DivergedError: in all processes, for the first batch whose loss is NaN or infinite.
    """

    def __init__(self, device: torch.device) -> None:
        self.sum = torch.tensor(0.0, device=device)  # since the last log
        self.logged_step = 0
        self.unchecked: list[tuple[int, torch.Tensor]] = []  # (optimizer steps before, loss)

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Records the loss of one batch, which follows `step` optimizer steps."""
        loss = loss.detach()
        self.sum += loss
        self.unchecked.append((step, loss))

    def mean_since_last_log(self, step: int, accelerator: Accelerator) -> float:
        """The mean loss per optimizer step over all processes since the last call."""
        sums: Any = accelerator.gather(self.sum.reshape(1))
        mean = sums.mean().item() / (step - self.logged_step)
        self.sum.zero_()
        self.logged_step = step
        return mean

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logged_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = control.should_log or control.should_evaluate or control.should_save
        if due or args.device.type == "cpu" or len(self.unchecked) >= MAX_UNCHECKED_LOSSES:
            self._check(args, kwargs["train_dataloader"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(args, kwargs["train_dataloader"])

    def _check(self, args: Any, dataloader: Any) -> None:
        losses, self.unchecked = self.unchecked, []
        finite = not losses or bool(torch.stack([loss for _, loss in losses]).isfinite().all())
        if not all_reduce_max(int(not finite)):
            return
        first = len(losses) if finite else next(n for n, (_, loss) in enumerate(losses) if not loss.isfinite())
        earliest = -all_reduce_max(-first)
        reporter = all_reduce_max(args.process_index if first == earliest else -1)
        message = run_on_rank(lambda: _message(args, dataloader, losses, earliest), reporter)
        raise DivergedError(message, losses[earliest][0] + 1)


def _message(args: Any, dataloader: Any, losses: list[tuple[int, torch.Tensor]], index: int) -> str:
    step, loss = losses[index]
    batch = sum(earlier == step for earlier, _ in losses[:index])
    rows = ", ".join(map(str, _batch_rows(args, dataloader, step, batch)))
    good = newest_valid(Path(str(args.output_dir))) or "none"
    return (
        f"the loss is {loss.item()} at step {step + 1}: lower train.lr, or use model.precision=fp32. Its batch holds "
        f"the training examples {rows} (counting from 0); the last good checkpoint: {good}"
    )


def _batch_rows(args: Any, dataloader: Any, step: int, batch: int) -> list[int]:
    """The row numbers of one batch of the encoded training set: the samplers repeat an epoch's order on demand."""
    accumulated = args.gradient_accumulation_steps
    epoch, done = divmod(step, math.ceil(len(dataloader) / accumulated))
    dataloader.set_epoch(epoch)
    return next(islice(dataloader.batch_sampler, done * accumulated + batch, None))
