"""Loss scaling for a frozen base in fp16.

The largest fp16 number is 65504, and the smallest is 6e-8. A base in fp16 returns gradients in fp16. Without scaling,
most of them would underflow to zero. The loss is therefore multiplied by a scale before the backward pass, and the
gradients are divided by it afterwards.

Source: Mixed Precision Training, arXiv 1710.03740, section 3.2. `torch.amp.GradScaler` halves and doubles the scale.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from lora_hf.core.errors import TrainingError

logger = logging.getLogger(__name__)

FIRST_SCALE = 2.0**16


class LossScaling(TrainerCallback):
    """Gives accelerate a gradient scaler if weights are fp16, and counts the steps that overflow.

    Under autocast, accelerate has its own scaler and unscales before clipping. Without autocast it does neither, so
    clipping happens here.

    Attributes:
        skipped: optimizer steps that were skipped because a gradient overflowed.
        grad_norm: the unscaled gradient norm of the last step; None if the Trainer computes it.

    Raises:
        TrainingError: the gradients overflow at any scale, or in every step.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, args: TrainingArguments) -> None:
        self.skipped = 0
        self.grad_norm: torch.Tensor | None = None
        self.last_scale = 1.0
        self.scaler: torch.amp.GradScaler | None = None
        if accelerator.scaler is None and any(each.dtype == torch.float16 for each in model.parameters()):
            self.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=FIRST_SCALE)
            accelerator.scaler = self.scaler
            self.max_grad_norm, args.max_grad_norm = args.max_grad_norm or torch.inf, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last_scale = _scale(kwargs["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.scaler is None:
            return
        optimizer = kwargs["optimizer"].optimizer
        self.scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before, self.last_scale = self.last_scale, _scale(kwargs["optimizer"])
        if self.last_scale >= before:
            return
        self.skipped += 1
        step = state.global_step + 1
        logger.info("step %d is skipped: a gradient overflows fp16; the new loss scale is %g", step, self.last_scale)
        if self.last_scale < 1:
            raise TrainingError(
                f"step {step}: the gradients overflow fp16, or are NaN, at any loss scale. Lower train.lr, or use "
                "model.precision=bf16 or fp32"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.skipped and self.skipped == state.global_step:
            raise TrainingError(
                f"all {self.skipped} steps were skipped, because their gradients overflow fp16: nothing was learned. "
                "Train longer, or use model.precision=bf16 or fp32"
            )


def _scale(optimizer: Any) -> float:
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
