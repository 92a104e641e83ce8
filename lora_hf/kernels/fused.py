"""The adapted projection as one autograd function: `reference.py` defines it, this is how it is run.

What it spares, beside the plain operations: x is saved once, and not at all in the precision of A; the low-rank product
is added to the projection's output in place; the backward adds the low-rank part of x's gradient to the frozen weight's
in place, and is skipped where nothing below is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

STEPS = 2**16  # in which a dropout is counted

# A frozen weight, or what makes it in a precision: a packed one is made for each product, and not kept in between.
Weight = torch.Tensor | Callable[[torch.dtype], torch.Tensor]


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    slices: Sequence[tuple[int, int]],
    dropout: float = 0.0,
) -> torch.Tensor:
    """`x W^T + bias`, and on each slice of its columns `scaling * dropout(x) A^T B^T` more; W gets no gradient.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, frozen, or what makes it; a transposed view where it is stored `(in, out)`.
        bias: `(out,)`, frozen.
        lora_A, lora_B, scaling, slices: as `reference.add_lora`.
        dropout: the share of x that the low-rank product does not see, to a 65,536th.

    Returns:
        `(..., out)`, in the precision of x.
    """
    keep = None
    if dropout:
        dropout = min(max(1, round(dropout * STEPS)), STEPS - 1) / STEPS
        keep = kept(x, dropout)
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, tuple(slices), keep, dropout)  # type: ignore[return-value]


def kept(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """uint8 of the shape of x, 1 with probability `1 - dropout`, a multiple of `1 / STEPS`, and 0 otherwise.

    On the CPU torch's `bernoulli_` takes about as long as the projection itself. Two random bytes an element, compared
    by a clamp, are several times cheaper.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, device=x.device).bernoulli_(1 - dropout).to(torch.uint8)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    first_kept = round(dropout * STEPS) - STEPS // 2  # of the values of an int16
    numbers = words.view(torch.int16)[: x.numel()].clamp_(first_kept - 1, first_kept)
    return numbers.sub_(first_kept - 1).to(torch.uint8).view(x.shape)


def fits(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> bool:
    """Whether `lora_linear` may stand in: a frozen projection in the precision of x, and no autocast that decides."""
    held = [tensor for tensor in (weight, bias) if isinstance(tensor, torch.Tensor)]
    fitting = all(not tensor.requires_grad and tensor.dtype == x.dtype for tensor in held)
    return fitting and not torch.is_autocast_enabled(x.device.type)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, lora_A: torch.Tensor,
        lora_B: torch.Tensor, scaling: float, slices: tuple[tuple[int, int], ...], keep: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:  # fmt: skip
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        held = weight if isinstance(weight, torch.Tensor) else None
        frozen = weight if isinstance(weight, torch.Tensor) else weight(x.dtype)
        ctx.make = weight if held is None else None
        down, up = lora_A.to(x.dtype), block_placed(lora_B.to(x.dtype), slices, frozen.shape[0])
        # The scaling goes where the numbers are fewest, on (tokens, r).
        scaling /= 1 - dropout
        projected = ((rows if keep is None else rows * keep.view_as(rows)) @ down.T).mul_(scaling)
        y = linear(rows, frozen, bias).addmm_(projected, up.T)
        ctx.save_for_backward(x, held, projected, down, up, keep)
        ctx.slices, ctx.scaling, ctx.dtypes = slices, scaling, (lora_A.dtype, lora_B.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, held, projected, down, up, keep = ctx.saved_tensors
        rows = x.shape[:-1].numel()
        dy = gradients[0].reshape(rows, up.shape[0])
        dprojected = (dy @ up).mul_(ctx.scaling)
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (ctx.make(x.dtype) if held is None else held)
            if keep is None:
                dx.addmm_(dprojected, down)
            else:
                dx.addcmul_(dprojected @ down, keep.view_as(dx).to(dx.dtype))
            dx = dx.view_as(x)
        if ctx.needs_input_grad[3]:
            seen = x if keep is None else x * keep
            dA = (dprojected.T @ seen.reshape(rows, x.shape[-1])).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            # The transposed product: with so few columns it is twice as fast.
            dB = _blocks((projected.T @ dy).T, ctx.slices).to(ctx.dtypes[1], memory_format=torch.contiguous_format)
        return dx, None, None, dA, dB, None, None, None, None


def block_placed(lora_B: torch.Tensor, slices: tuple[tuple[int, int], ...], out: int) -> torch.Tensor:
    """`(out, n * r)`: the B of each slice in its own rows and columns, zeros elsewhere: one product for all."""
    if slices == ((0, out),):
        return lora_B
    r, row = lora_B.shape[1], 0
    whole = lora_B.new_zeros(out, len(slices) * r)
    for index, (start, stop) in enumerate(slices):
        whole[start:stop, index * r : (index + 1) * r] = lora_B[row : row + stop - start]
        row += stop - start
    return whole


def _blocks(whole: torch.Tensor, slices: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The blocks of `block_placed` from their places, stacked as `lora_B` is."""
    if slices == ((0, whole.shape[0]),):
        return whole
    r = whole.shape[1] // len(slices)
    return torch.cat([whole[start:stop, i * r : (i + 1) * r] for i, (start, stop) in enumerate(slices)])
