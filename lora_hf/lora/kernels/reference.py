"""The definition of the adapted projection in plain tensor operations; every faster kernel must equal it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from lora_hf.lora.slices import Slices, slice_columns, split_rows


def add_lora(base_output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, slices: Slices) -> Tensor:
    """`y[slice] = base_output[slice] + scaling * x A^T B^T` for each slice (LoRA, arXiv 2106.09685, equation 3).

    The product runs in the precision of `x`: fp32 weights are rounded to it here, and their gradients are fp32.

    Args:
        base_output: `(..., out)`, the output of the frozen projection.
        x: `(..., in)`, the input after dropout.
        lora_A: `(n * r, in)`, the A of each of the n slices, stacked.
        lora_B: `(sum of slice widths, r)`, the B of each slice, stacked.
        scaling: `lora_alpha / r`.
        slices: the n slices of the output (`lora.slices`); `[(0, out)]` if the whole projection is adapted.

    Returns:
        `(..., out)`, in the precision of `base_output`.
    """
    projected = (linear(x, lora_A.to(x.dtype)) * scaling).split(lora_B.shape[1], dim=-1)
    blocks = zip(projected, split_rows(lora_B, slices), strict=True)
    outputs = [linear(part, b.to(x.dtype)) for part, b in blocks]
    if list(slices) == [(0, base_output.shape[-1])]:
        return base_output + outputs[0]
    y = base_output.clone()
    for piece, output in zip(slices, outputs, strict=True):
        y[..., slice_columns(piece, y.device)] += output
    return y
