"""Dropout whose mask costs little to draw and to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STEPS = 2**16  # resolution of a dropout probability


def round_dropout(dropout: float) -> float:
    """The multiple of `1 / STEPS` between 0 and 1 that `dropout_mask` can draw; 0 stays 0."""
    return min(max(1, round(dropout * STEPS)), STEPS - 1) / STEPS if dropout else 0.0


def dropout_mask(shape: Sequence[int], dropout: float, device: torch.device) -> Tensor:
    """A uint8 mask: 1 with probability `1 - dropout`, a multiple of `1 / STEPS`, and 0 otherwise.

    On the CPU torch's `bernoulli_` takes about as long as the projection itself. Two random bytes for each element,
    compared by a clamp, are several times faster.
    """
    if device.type != "cpu":
        return torch.empty(shape, device=device).bernoulli_(1 - dropout).to(torch.uint8)
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    first_kept = round(dropout * STEPS) - STEPS // 2  # as an int16
    numbers = words.view(torch.int16)[:count].clamp_(first_kept - 1, first_kept)
    return numbers.sub_(first_kept - 1).to(torch.uint8).view(shape)


def apply_mask(x: Tensor, keep: Tensor, dropout: float) -> Tensor:
    """x where `keep` is 1, scaled so that its mean stays; also the gradient of x from that of the result."""
    return (x * keep).mul_(1 / (1 - dropout))


class MaskedDropout(nn.Dropout):
    """`nn.Dropout` with the mask of `dropout_mask` on the CPU; elsewhere torch's own kernel is faster."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return nn.functional.dropout(input, self.p, self.training)
        return _Dropout.apply(input, round_dropout(self.p))  # type: ignore[return-value]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float) -> Tensor:
        keep = dropout_mask(x.shape, dropout, x.device)
        ctx.save_for_backward(keep)
        ctx.dropout = dropout
        return apply_mask(x, keep, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return apply_mask(gradients[0], keep, ctx.dropout), None
