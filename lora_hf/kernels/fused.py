"""The adapted projection as one autograd function: `reference.py` defines it, this is how it is run.

What it spares, beside the plain operations: x is saved once, and not at all in the precision of A; the low-rank product
is added to the projection's output in place; the backward adds the low-rank part of x's gradient to the frozen weight's
in place, and is skipped where nothing below is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

STEPS = 2**16  # in which a dropout is counted

# A frozen weight, or what makes it in a precision: a packed one is made for each product, and not kept in between.
Weight = torch.Tensor | Callable[[torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """The low-rank product of one adapter on the places `start:stop` of a batch; the arguments as `lora_linear`'s."""

    start: int
    stop: int
    lora_A: torch.Tensor  # noqa: N815
    lora_B: torch.Tensor  # noqa: N815
    scaling: float
    slices: Sequence[tuple[int, int]]
    dropout: float = 0.0


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
    whole = Part(0, x.shape[:-1].numel(), lora_A, lora_B, scaling, slices, dropout)
    return lora_linear_parts(x, weight, bias, [whole])


def lora_linear_parts(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, parts: Sequence[Part]
) -> torch.Tensor:
    """`lora_linear` with an adapter of its own for each part of the places of x, which are counted in order.

    A place in no part gets the frozen projection alone.
    """
    settings, factors = [], []
    for part in parts:
        dropout, keep = part.dropout, None
        if dropout:
            dropout = min(max(1, round(dropout * STEPS)), STEPS - 1) / STEPS
            keep = kept((part.stop - part.start, x.shape[-1]), dropout, x.device)
        settings.append((slice(part.start, part.stop), part.scaling / (1 - dropout), tuple(part.slices), keep))
        factors += [part.lora_A, part.lora_B]
    return _LoraLinear.apply(x, weight, bias, settings, *factors)  # type: ignore[return-value]


def kept(shape: Sequence[int], dropout: float, device: torch.device) -> torch.Tensor:
    """uint8 of a shape, 1 with probability `1 - dropout`, a multiple of `1 / STEPS`, and 0 otherwise.

    On the CPU torch's `bernoulli_` takes about as long as the projection itself. Two random bytes an element, compared
    by a clamp, are several times cheaper.
    """
    if device.type != "cpu":
        return torch.empty(shape, device=device).bernoulli_(1 - dropout).to(torch.uint8)
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    first_kept = round(dropout * STEPS) - STEPS // 2  # of the values of an int16
    numbers = words.view(torch.int16)[:count].clamp_(first_kept - 1, first_kept)
    return numbers.sub_(first_kept - 1).to(torch.uint8).view(shape)


def fits(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> bool:
    """Whether `lora_linear` may stand in: a frozen projection in the precision of x, and no autocast that decides."""
    held = [tensor for tensor in (weight, bias) if isinstance(tensor, torch.Tensor)]
    fitting = all(not tensor.requires_grad and tensor.dtype == x.dtype for tensor in held)
    return fitting and not torch.is_autocast_enabled(x.device.type)


# Of a part: its places, its scaling with that of the dropout, its slices, and what the dropout keeps.
_Setting = tuple[slice, float, tuple[tuple[int, int], ...], torch.Tensor | None]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        settings: Sequence[_Setting],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        held = weight if isinstance(weight, torch.Tensor) else None
        frozen = weight if isinstance(weight, torch.Tensor) else weight(x.dtype)
        ctx.make = weight if held is None else None
        y, saved = linear(rows, frozen, bias), []
        for (places, scaling, slices, keep), lora_A, lora_B in zip(settings, factors[::2], factors[1::2], strict=True):
            down, up = lora_A.to(x.dtype), block_placed(lora_B.to(x.dtype), slices, frozen.shape[0])
            seen = rows[places] if keep is None else rows[places] * keep
            # The scaling goes where the numbers are fewest, on (tokens, r).
            projected = (seen @ down.T).mul_(scaling)
            y[places].addmm_(projected, up.T)
            saved += [projected, down, up, keep]
        ctx.save_for_backward(x, held, *saved)
        ctx.settings = [(places, scaling, slices) for places, scaling, slices, _ in settings]
        ctx.dtypes = [factor.dtype for factor in factors]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, held, *saved = ctx.saved_tensors
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        dy = gradients[0].reshape(len(rows), gradients[0].shape[-1])
        dx = dy @ (ctx.make(x.dtype) if held is None else held) if ctx.needs_input_grad[0] else None
        of_factors: list[torch.Tensor | None] = []
        for number, (places, scaling, slices) in enumerate(ctx.settings):
            projected, down, up, keep = saved[4 * number : 4 * number + 4]
            of_a, of_b = ctx.dtypes[2 * number : 2 * number + 2]
            own = dy[places]
            dprojected = (own @ up).mul_(scaling)
            dA = dB = None
            if dx is not None and keep is None:
                dx[places].addmm_(dprojected, down)
            elif dx is not None:
                dx[places].addcmul_(dprojected @ down, keep.to(dx.dtype))
            if ctx.needs_input_grad[4 + 2 * number]:
                seen = rows[places] if keep is None else rows[places] * keep
                dA = (dprojected.T @ seen).to(of_a)
            if ctx.needs_input_grad[5 + 2 * number]:
                # The transposed product: with so few columns it is twice as fast.
                dB = _blocks((projected.T @ own).T, slices).to(of_b, memory_format=torch.contiguous_format)
            of_factors += [dA, dB]
        return None if dx is None else dx.view_as(x), None, None, None, *of_factors


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
