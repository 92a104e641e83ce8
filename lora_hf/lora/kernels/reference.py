"""The definition of the adapted projection, in plain tensor operations; every faster kernel must equal it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from lora_hf.lora.slices import split_rows


def add_lora(
    base_output: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    slices: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """`y[slice] = base_output[slice] + scaling * x A^T B^T` for each slice (LoRA, arXiv 2106.09685, equation 3).

    The product runs in the precision of `x`: fp32 weights are rounded to it here, their gradients come back fp32.

    Args:
        base_output: `(..., out)`, what the frozen projection gave.
        x: `(..., in)`, the input, dropout already applied.
        lora_A: `(n * r, in)`, the A of each of the n slices, stacked.
        lora_B: `(sum of slice widths, r)`, the B of each slice, stacked.
        scaling: `lora_alpha / r`.
        slices: n pairs `(start, stop)` of output columns; one pair `(0, out)` where the whole projection is adapted.

    Returns:
        `(..., out)`, in the precision of `base_output`.
    """
    projected = linear(x, lora_A.to(x.dtype)) * scaling
    parts = zip(projected.split(lora_B.shape[1], dim=-1), split_rows(lora_B, slices), strict=True)
    outputs = [linear(part, b.to(x.dtype)) for part, b in parts]
    if slices == [(0, base_output.shape[-1])]:
        return base_output + outputs[0]
    y = base_output.clone()
    for (start, stop), output in zip(slices, outputs, strict=True):
        y[..., start:stop] += output
    return y
