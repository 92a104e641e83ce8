"""Compares the Triton kernels with the reference in Triton's interpreter; prints one JSON object.

A process of its own: triton reads `TRITON_INTERPRET` when it is first imported.
"""

from __future__ import annotations

import json
import os

os.environ |= {"TRITON_INTERPRET": "1", "LORA_HF_TRITON": "1"}

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from lora_hf.lora.kernels.fused import STEPS, lora_linear
from lora_hf.lora.kernels.philox import Philox, keep_mask
from lora_hf.lora.kernels.reference import add_lora

DROPOUT, SCALING = 0.3, 1.7
THRESHOLD = round(DROPOUT * STEPS)
# tokens, in, out, r, slices
SHAPES = {
    "one token": (1, 5, 7, 2, [(0, 7)]),
    "odd": (67, 131, 30, 5, [(0, 30)]),
    "two slices": (65, 72, 24, 3, [(0, 8), (16, 24)]),
    "interleaved": (9, 16, 24, 4, [(0, 24, 4, 12), (8, 24, 4, 12)]),
    "full tiles": (128, 128, 16, 16, [(0, 16)]),
}


@triton.jit
def _write_mask(out, seed, tokens, columns, threshold, M: tl.constexpr, K: tl.constexpr):
    rows, own = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * K + tl.arange(0, K)
    keep = keep_mask(seed, rows, tl.program_id(1) * K, (columns + 7) // 8, threshold, M, K)
    inside = (rows[:, None] < tokens) & (own[None, :] < columns)
    tl.store(out + rows[:, None] * columns + own[None, :], keep.to(tl.int8), mask=inside)


def mask(philox: Philox, tokens: int, columns: int) -> torch.Tensor:
    """What the kernels keep, computed in tiles of another size."""
    out = torch.zeros(tokens, columns, dtype=torch.int8)
    grid = (triton.cdiv(tokens, 16), triton.cdiv(columns, 32))
    _write_mask[grid](out, philox.seed, tokens, columns, philox.threshold, 16, 32)
    return out


def results(how: str, dtype: torch.dtype, shape: tuple, two_dimensional: bool) -> list[torch.Tensor]:
    """Output and the gradients of x, A and B."""
    tokens, columns, width, r, slices = shape
    torch.manual_seed(0)
    weight, bias = torch.randn(width, columns).to(dtype), torch.randn(width).to(dtype)
    x = torch.randn(tokens, columns).to(dtype)
    x = (x if two_dimensional else x[None]).requires_grad_()
    a = torch.randn(r * len(slices), columns).requires_grad_()
    b = torch.randn(sum(len(torch.arange(width)[_columns(piece)]) for piece in slices), r).requires_grad_()
    upstream = torch.randn(*x.shape[:-1], width).to(dtype)
    torch.manual_seed(1)
    if how == "triton":
        y = lora_linear(x, weight, bias, a, b, SCALING, slices, DROPOUT)
    else:
        philox = Philox.draw(THRESHOLD)
        if how == "another seed":
            philox = Philox(philox.seed + 1, THRESHOLD)
        keep = mask(philox, tokens, columns).double() / (1 - THRESHOLD / STEPS)
        y = add_lora(linear(x, weight, bias), (x * keep.view(x.shape)).to(dtype), a, b, SCALING, slices)
    y.backward(upstream)
    return [y.detach(), x.grad, a.grad, b.grad]


def _columns(piece: tuple) -> slice | torch.Tensor:
    from lora_hf.lora.slices import slice_columns

    return slice_columns(piece)


def apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict[str, float]:
    pairs = zip(("y", "x", "A", "B"), found, wanted, strict=True)
    return {name: float((f - w).abs().max() / w.abs().max()) for name, f, w in pairs}


def main() -> None:
    Philox.can_draw = staticmethod(lambda x, rank: True)  # also without a GPU
    drawn = mask(Philox(11, THRESHOLD), 400, 1001).double()
    flat = drawn.flatten() - drawn.mean()
    found: dict = {
        "share": float(drawn.mean()),
        "neighbors": {n: float((flat[n:] * flat[:-n]).mean()) for n in (1, 2, 4, 8, 1001, 8008)},
        "differences": {},
    }
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            made = [results(how, dtype, shape, name != "odd") for how in ("triton", "reference", "another seed")]
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            found["differences"][key] = {"right": apart(made[0], made[1]), "wrong": apart(made[0], made[2])}
    found["mask bytes"] = sum(
        tensor.nbytes for tensor in saved_by_triton() if tensor.dtype in (torch.uint8, torch.int8, torch.bool)
    )
    print(json.dumps(found))


def saved_by_triton() -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    x = torch.randn(8, 16, requires_grad=True)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, torch.randn(4, 16), None, a, b, 1.0, [(0, 4)], DROPOUT)
    return saved


if __name__ == "__main__":
    main()
