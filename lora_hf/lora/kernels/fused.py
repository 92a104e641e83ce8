"""The adapted projection as one autograd function; `reference.py` defines what it computes.

It saves over the plain operations: x is saved once, and never in the precision of A; the low-rank product is added to
the projection's output in place; the backward pass adds the low-rank part of x's gradient in place, and skips it if
nothing below is trained.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

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
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling / (1 - dropout), slices, keep)  # type: ignore[return-value]


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


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        slices: Slices,
        keep: Any,
    ) -> Tensor:
        """`scaling` includes that of the dropout, and `keep` is its mask, a `Philox` that draws it, or None."""
        inputs = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        tensor = weight if isinstance(weight, Tensor) else None
        ctx.unpacker = None if isinstance(weight, Tensor) else weight
        frozen = _unpacked(weight, x.dtype)
        # Some models go on in place, which autograd refuses for a view, such as `linear` returns if there is a bias.
        output = x.new_empty(*x.shape[:-1], len(frozen))
        y = output.view(len(inputs), len(frozen))
        _project(inputs, frozen, bias, y)
        down, up = lora_A.to(x.dtype), block_diagonal(lora_B.to(x.dtype), slices, y.shape[1])
        mask, ctx.philox = (keep, None) if keep is None or isinstance(keep, Tensor) else (None, keep)
        if ctx.philox is not None:
            projected = ctx.philox.project(inputs, down, scaling)
        else:
            # Scaling is cheapest on the smallest tensor, (rows, r).
            projected = ((inputs if mask is None else inputs * mask) @ down.T).mul_(scaling)
        y.addmm_(projected, up.T)
        ctx.save_for_backward(x, tensor, projected, down, up, mask)
        ctx.scaling, ctx.slices, ctx.dtypes = scaling, slices, (lora_A.dtype, lora_B.dtype)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, tensor, projected, down, up, keep = ctx.saved_tensors
        needs_dx, _, _, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        inputs = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        dy = gradients[0].reshape(len(inputs), gradients[0].shape[-1])
        dprojected = (dy @ up).mul_(ctx.scaling)
        dx = dA = dB = None
        if needs_dx:
            dx = dy @ (ctx.unpacker(x.dtype) if tensor is None else tensor)
            if ctx.philox is not None:
                ctx.philox.add_product(dx, dprojected, down)
            elif keep is None:
                dx.addmm_(dprojected, down)
            else:
                dx.addcmul_(dprojected @ down, keep.to(dx.dtype))
            dx = dx.view_as(x)
        if needs_dA and ctx.philox is not None:
            dA = ctx.philox.gradient(dprojected, inputs).to(ctx.dtypes[0])
        elif needs_dA:
            dropped = inputs if keep is None else inputs * keep
            dA = (dprojected.T @ dropped).to(ctx.dtypes[0])
        if needs_dB:
            # The transposed product is twice as fast, because it has so few rows.
            blocks = diagonal_blocks((projected.T @ dy).T, ctx.slices)
            dB = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
            dB = dB.to(ctx.dtypes[1], memory_format=torch.contiguous_format)
        return dx, None, None, dA, dB, None, None, None
