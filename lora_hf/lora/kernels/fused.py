"""The adapted projections of one input as one autograd function; `reference.py` defines what each computes.

It saves over the plain operations: x is saved once, and never in the precision of A; the low-rank product is added to
the projection's output in place; the backward pass adds the low-rank part of x's gradient in place, and skips it if
nothing below is trained. Projections of one input multiply it once by all A, and sum its gradient in place.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lora_hf.core.errors import ConfigError
from lora_hf.lora.kernels.dropout import STEPS, dropout_mask, round_dropout
from lora_hf.lora.quantization import is_torchao
from lora_hf.lora.slices import Slices, block_diagonal, diagonal_blocks

# A frozen weight, or the function that unpacks it to a precision for each product, so that it is not kept in between.
Weight = Tensor | Callable[[torch.dtype], Tensor]


class Projection(NamedTuple):
    """The frozen projection `x W^T + bias` and the low-rank update beside it, as `lora_linear` describes them."""

    weight: Weight
    bias: Tensor | None
    lora_A: Tensor  # noqa: N815 - its name everywhere
    lora_B: Tensor  # noqa: N815
    scaling: float
    slices: Slices


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    slices: Slices,
    dropout: float = 0.0,
) -> Tensor:
    """`x W^T + bias`, plus `scaling * dropout(x) A^T B^T` on each slice of its columns; W gets no gradient.

    `lora_A`, `lora_B`, `scaling` and `slices` are those of `reference.add_lora`.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, frozen, or the function that unpacks it; a transposed view if it is stored `(in, out)`.
        bias: `(out,)`, frozen.
        dropout: the probability with which the low-rank product drops an element of x, rounded to a multiple of 2^-16.

    Returns:
        `(..., out)`, in the precision of x.
    """
    keep: Any = None
    dropout = round_dropout(dropout)
    if dropout:
        philox = _philox()
        if philox is not None and philox.can_draw(x, len(lora_A)):
            keep = philox.draw(round(dropout * STEPS))
        else:
            keep = dropout_mask((x.shape[:-1].numel(), x.shape[-1]), dropout, x.device)
    elif not torch.is_grad_enabled():
        # A function of autograd would take longer than the products of a single token.
        return _without_gradients(x, weight, bias, lora_A, lora_B, scaling, slices)
    projection = Projection(weight, bias, lora_A, lora_B, scaling / (1 - dropout), slices)
    return _LoraLinears.apply(x, [projection], keep, lora_A, lora_B)[0]  # type: ignore[index]


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The `lora_linear` of each projection, without dropout: x is multiplied once by all A."""
    factors = [factor for each in projections for factor in (each.lora_A, each.lora_B)]
    return _LoraLinears.apply(x, projections, None, *factors)  # type: ignore[return-value]


@functools.cache
def _philox() -> Any:
    """The class of the Triton kernels that store no mask (`kernels/philox.py`); None unless `LORA_HF_TRITON=1`."""
    if os.environ.get("LORA_HF_TRITON") != "1":
        return None
    try:
        from lora_hf.lora.kernels.philox import Philox
    except ImportError as error:
        raise ConfigError(f"LORA_HF_TRITON=1 needs triton, which cannot be imported ({error}): unset it") from error
    return Philox


def can_fuse(x: Tensor, weight: Weight, bias: Tensor | None) -> bool:
    """Whether `lora_linear` can replace the reference: a frozen projection in the precision of x, without autocast."""
    tensors = [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]
    is_frozen = all(not tensor.requires_grad and tensor.dtype == x.dtype for tensor in tensors)
    return is_frozen and not is_torchao(weight) and not torch.is_autocast_enabled(x.device.type)


def _unpacked(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight(dtype)


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
    if bias is None:
        torch.mm(inputs, weight.T, out=output)
    else:
        torch.addmm(bias, inputs, weight.T, out=output)


def _without_gradients(
    x: Tensor, weight: Weight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, slices: Slices
) -> Tensor:
    output = linear(x, _unpacked(weight, x.dtype), bias)
    y = output.view(output.shape[:-1].numel(), output.shape[-1])
    up = block_diagonal(lora_B.to(x.dtype), slices, y.shape[1])
    y.addmm_(x.reshape(len(y), x.shape[-1]) @ lora_A.to(x.dtype).T, up.T, alpha=scaling)
    return output


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: Sequence[Projection], keep: Any, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        """`keep` is the mask of the dropout, a `Philox` that draws it, or None; `factors` are A and B of each."""
        inputs = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        downs, scalings = factors[::2], [each.scaling for each in projections]
        down = (downs[0] if len(downs) == 1 else torch.cat(downs)).to(x.dtype)
        mask, ctx.philox = (keep, None) if keep is None or isinstance(keep, Tensor) else (None, keep)
        ctx.scalings, ctx.ranks = scalings, [len(each) for each in downs]
        if ctx.philox is not None:
            projected = ctx.philox.project(inputs, down, *scalings)
        else:
            projected = _scale((inputs if mask is None else inputs * mask) @ down.T, ctx)
        outputs, ups = [], []
        for each, part in zip(projections, _parts(projected, ctx.ranks, 1), strict=True):
            frozen = _unpacked(each.weight, x.dtype)
            # Some models go on in place, which autograd refuses for a view, such as `linear` returns with a bias.
            output = x.new_empty(*x.shape[:-1], len(frozen))
            y = output.view(len(inputs), len(frozen))
            _project(inputs, frozen, each.bias, y)
            up = block_diagonal(each.lora_B.to(x.dtype), each.slices, len(frozen))
            y.addmm_(part, up.T)
            outputs.append(output)
            ups.append(up)
        tensors = [each.weight if isinstance(each.weight, Tensor) else None for each in projections]
        ctx.save_for_backward(x, projected, down, mask, *ups, *tensors)
        ctx.unpackers = [None if isinstance(each.weight, Tensor) else each.weight for each in projections]
        ctx.slices, ctx.dtypes = [each.slices for each in projections], [each.dtype for each in factors]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, down, keep, *rest = ctx.saved_tensors
        count = len(gradients)
        ups, tensors = rest[:count], rest[count:]
        needs_dx, _, _, *needs = ctx.needs_input_grad
        inputs = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        dys = [each.reshape(len(inputs), each.shape[-1]) for each in gradients]
        products = [dy @ up for dy, up in zip(dys, ups, strict=True)]
        dprojected = _scale(products[0] if count == 1 else torch.cat(products, 1), ctx)
        dx = _input_gradient(ctx, x, dys, tensors, dprojected, down, keep) if needs_dx else None
        factors: list[Tensor | None] = [None] * len(needs)
        if any(needs[::2]):
            if ctx.philox is not None:
                dA = ctx.philox.gradient(dprojected, inputs)
            else:
                dA = dprojected.T @ (inputs if keep is None else inputs * keep)
            factors[::2] = _parts(dA.to(ctx.dtypes[0]), ctx.ranks, 0)
        for index, (dy, part) in enumerate(zip(dys, _parts(projected, ctx.ranks, 1), strict=True)):
            if needs[2 * index + 1]:
                # The transposed product is twice as fast, because it has so few rows.
                blocks = diagonal_blocks((part.T @ dy).T, ctx.slices[index])
                dB = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
                factors[2 * index + 1] = dB.to(ctx.dtypes[2 * index + 1], memory_format=torch.contiguous_format)
        return dx, None, None, *factors


def _parts(tensor: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    return [tensor] if len(sizes) == 1 else tensor.split(sizes, dim)  # a view less for most projections


def _scale(product: Tensor, ctx: Any) -> Tensor:
    """Multiplies the columns of each projection by its scaling: cheapest on the smallest tensor, `(rows, r)`."""
    if len(set(ctx.scalings)) == 1:
        return product.mul_(ctx.scalings[0])
    for part, scaling in zip(_parts(product, ctx.ranks, 1), ctx.scalings, strict=True):
        part.mul_(scaling)
    return product


def _input_gradient(
    ctx: Any,
    x: Tensor,
    dys: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    dprojected: Tensor,
    down: Tensor,
    keep: Tensor | None,
) -> Tensor:
    dx: Any = None
    for dy, tensor, unpacker in zip(dys, tensors, ctx.unpackers, strict=True):
        weight = unpacker(x.dtype) if tensor is None else tensor
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    if ctx.philox is not None:
        ctx.philox.add_product(dx, dprojected, down)
    elif keep is None:
        dx.addmm_(dprojected, down)
    else:
        dx.addcmul_(dprojected @ down, keep.to(dx.dtype))
    return dx.view_as(x)
