"""The adapted projection as one autograd function: `reference.py` defines it, this is how it is run.

What it spares, beside the plain operations: x is saved once, and not at all in the precision of A; the low-rank product
is added to the projection's output in place; the backward adds the low-rank part of x's gradient to the frozen weight's
in place, and is skipped where nothing below is trained.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lora_hf.lora.slices import block_diagonal, diagonal_blocks

STEPS = 2**16  # in which a dropout is counted
MASKED = 128  # columns of A that parts may share: small beside a projection's, and beside the calls that it spares

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

    `lora_A`, `lora_B`, `scaling` and `slices` are those of `reference.add_lora`.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, frozen, or what makes it; a transposed view where it is stored `(in, out)`.
        bias: `(out,)`, frozen.
        dropout: the share of x that the low-rank product does not see, to a 65,536th.

    Returns:
        `(..., out)`, in the precision of x.
    """
    whole = Part(0, x.shape[:-1].numel(), lora_A, lora_B, scaling, slices, dropout)
    return lora_linear_parts(x, weight, bias, [whole])


def lora_linear_parts(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, parts: Sequence[Part], masked: bool = False
) -> torch.Tensor:
    """`lora_linear` with an adapter of its own for each part of the places of x, which are counted in order.

    A place in no part gets the frozen projection alone.

    Args:
        masked: multiply every place by the factors of all parts without dropout, and mask what is not its own: a few
            large products instead of many small ones. An infinite number in one part then spoils the others too.
    """
    groups, factors = [], []
    for members in _grouped(parts) if masked else [[part] for part in parts]:
        dropout, keep = members[0].dropout, None
        places = slice(members[0].start, members[-1].stop)
        if dropout:
            dropout = min(max(1, round(dropout * STEPS)), STEPS - 1) / STEPS
            keep = dropout_mask((places.stop - places.start, x.shape[-1]), dropout, x.device)
        scaling = members[0].scaling / (1 - dropout) if len(members) == 1 else _mask(members, x)
        groups.append((places, scaling, [tuple(part.slices) for part in members], keep))
        factors += [factor for part in members for factor in (part.lora_A, part.lora_B)]
    return _LoraLinear.apply(x, weight, bias, groups, *factors)  # type: ignore[return-value]


def _grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts in order, those together that follow each other without dropout and have at most MASKED columns."""
    groups: list[list[Part]] = []
    for part in parts:
        last = groups[-1] if groups else [part]
        columns = sum(len(member.lora_A) for member in (*last, part))
        if groups and columns <= MASKED and not part.dropout and not last[0].dropout:
            last.append(part)
        else:
            groups.append([part])
    return groups


def _mask(parts: Sequence[Part], x: torch.Tensor) -> torch.Tensor:
    """`(places of the parts, their columns)`: the scaling of a part where its places meet its columns, else zero."""
    widths = tuple(len(part.lora_A) for part in parts)
    where = tuple((part.start - parts[0].start, part.stop - parts[0].start, part.scaling) for part in parts)
    return _drawn_mask(where, widths, x.dtype, x.device)


@functools.lru_cache(maxsize=4)  # the layers of a model ask for the same few
def _drawn_mask(
    where: tuple[tuple[int, int, float], ...], widths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    mask, column = torch.zeros(where[-1][1], sum(widths), dtype=dtype, device=device), 0
    for (start, stop, scaling), width in zip(where, widths, strict=True):
        mask[start:stop, column : column + width] = scaling
        column += width
    return mask


def dropout_mask(shape: Sequence[int], dropout: float, device: torch.device) -> torch.Tensor:
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


def can_fuse(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> bool:
    """Whether `lora_linear` may stand in: a frozen projection in the precision of x, and no autocast that decides."""
    held = [tensor for tensor in (weight, bias) if isinstance(tensor, torch.Tensor)]
    fitting = all(not tensor.requires_grad and tensor.dtype == x.dtype for tensor in held)
    return fitting and not torch.is_autocast_enabled(x.device.type)


# Of parts that are multiplied together: their places, the scaling with that of the dropout or the mask that holds it,
# the slices of each, and what the dropout keeps.
_Group = tuple[slice, "float | torch.Tensor", list[tuple[tuple[int, int], ...]], "torch.Tensor | None"]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        groups: Sequence[_Group],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        held = weight if isinstance(weight, torch.Tensor) else None
        frozen = weight if isinstance(weight, torch.Tensor) else weight(x.dtype)
        ctx.make = weight if held is None else None
        y, saved, pairs = linear(rows, frozen, bias), [], zip(factors[::2], factors[1::2], strict=True)
        for places, scaling, slices, keep in groups:
            own = [next(pairs) for _ in slices]
            down = _joined([a.to(x.dtype) for a, _ in own], 0)
            ups = [block_diagonal(b.to(x.dtype), at, y.shape[1]) for at, (_, b) in zip(slices, own, strict=True)]
            up = _joined(ups, 1)
            seen = rows[places] if keep is None else rows[places] * keep
            # The scaling goes where the numbers are fewest, on (tokens, r).
            projected = (seen @ down.T).mul_(scaling)
            y[places].addmm_(projected, up.T)
            saved += [projected, down, up, keep]
        ctx.save_for_backward(x, held, *saved)
        ctx.groups = [(places, scaling, slices) for places, scaling, slices, _ in groups]
        ctx.widths = [len(lora_A) for lora_A in factors[::2]]
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
        for number, (places, scaling, slices) in enumerate(ctx.groups):
            projected, down, up, keep = saved[4 * number : 4 * number + 4]
            at = len(of_factors)
            asked, dtypes = ctx.needs_input_grad[4 + at :], ctx.dtypes[at:]
            widths = ctx.widths[at // 2 : at // 2 + len(slices)]
            own = dy[places]
            dprojected = (own @ up).mul_(scaling)
            dA: Sequence[torch.Tensor | None] = [None] * len(slices)
            dB: Sequence[torch.Tensor | None] = [None] * len(slices)
            if dx is not None and keep is None:
                dx[places].addmm_(dprojected, down)
            elif dx is not None:
                dx[places].addcmul_(dprojected @ down, keep.to(dx.dtype))
            if any(asked[0 : 2 * len(slices) : 2]):
                seen = rows[places] if keep is None else rows[places] * keep
                dA = (dprojected.T @ seen).split(widths)
            if any(asked[1 : 2 * len(slices) : 2]):
                # The transposed product: with so few columns it is twice as fast.
                whole = (projected.T @ own).split(widths)
                dB = [_joined(diagonal_blocks(part.T, its), 0) for part, its in zip(whole, slices, strict=True)]
            for factor in (factor for pair in zip(dA, dB, strict=True) for factor in pair):
                dtype = dtypes[len(of_factors) - at]
                of_factors.append(None if factor is None else factor.to(dtype, memory_format=torch.contiguous_format))
        return None if dx is None else dx.view_as(x), None, None, None, *of_factors


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
