"""Gradients beyond the range of fp16: the loss is scaled, and a step that overflows all the same is left out and told.

fp16 ends at 65504 and holds nothing below 6e-8. A frozen base in fp16 hands back gradients of that precision, of which
those of a plain loss would fall to zero: the loss is multiplied before, and the gradients are divided after.

Source: Mixed Precision Training, arXiv 1710.03740, section 3.2; the scale is halved and doubled by `torch.amp`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from lora_hf.core.errors import TrainingError

logger = logging.getLogger(__name__)

FIRST_SCALE = 2.0**16


class Overflow(TrainerCallback):
    """Scales the losses of a model that holds fp16, and counts the steps that are left out.

    Under autocast the Trainer has a scale of its own; its steps are counted too.

    Raises:
        TrainingError: a run whose gradients overflow at any scale, or at each of its steps.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.skipped = 0
        self.before = 1.0  # the scale of the last step
        self.scaler: torch.amp.GradScaler | None = None
        if accelerator.scaler is None and any(each.dtype == torch.float16 for each in model.parameters()):
            self.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=FIRST_SCALE)
            accelerator.scaler = self.scaler

    def unscale(self, optimizer: Any) -> None:
        """Divides the gradients before they are clipped, which Accelerate does under its own autocast alone."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer.optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = _scale(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer, before = kwargs["optimizer"], self.before
        self.before = scale = _scale(optimizer)
        if scale >= before:
            return
        # A fused optimiser is called and does nothing, which Accelerate takes for a step: the schedule would go on.
        optimizer._is_overflow = True
        self.skipped += 1
        step = state.global_step + 1
        logger.info("step %d is left out: a gradient is beyond fp16; the loss is now scaled by %g", step, scale)
        if scale < 1:
            raise TrainingError(
                f"step {step}: the gradients are beyond fp16, or no numbers, however little the loss is scaled. Lower "
                "train.lr, or use model.precision=bf16 or fp32"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.skipped and self.skipped == state.global_step:
            raise TrainingError(
                f"all {self.skipped} steps were left out, as their gradients are beyond fp16: nothing was learned. "
                "Train longer, or use model.precision=bf16 or fp32"
            )


def _scale(optimizer: Any) -> float:
    """What losses are multiplied by at present."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
