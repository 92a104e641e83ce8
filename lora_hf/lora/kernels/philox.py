"""Triton kernels for the low-rank products of an input with dropout, which store no mask.

Whether an element is dropped is a function of a seed and its place (Philox, Salmon et al. 2011), so each kernel
computes it anew for the tile that it loads. With torch, a projection draws, writes, reads and keeps for the backward
pass a mask of the size of its input, and writes two masked inputs.

Off unless `LORA_HF_TRITON=1`, and then used on CUDA alone: they have run in Triton's interpreter, and on no GPU yet.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_RANK = 256  # of all slices together: one tile holds it
BLOCK_M, BLOCK_K = 64, 64  # tokens and columns of a tile
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # numpy, which has no products in bf16
SPLITS = 32  # parts of the tokens that the gradient of A sums apart


@dataclass(frozen=True)
class Philox:
    """What is kept of an input: 16 random bits of each element are at least `threshold`.

    `inputs` is `(tokens, in)`, `down` `(r, in)` and `projected` `(tokens, r)`, all of one precision.
    """

    seed: int
    threshold: int

    @staticmethod
    def can_draw(x: Tensor, rank: int) -> bool:
        """Whether the kernels take an input and a rank of all slices together."""
        return x.is_cuda and x.dtype != torch.float64 and rank <= LARGEST_RANK and x.numel() > 0

    @classmethod
    def draw(cls, threshold: int) -> Philox:
        """From torch's generator on the host, which activation checkpointing restores."""
        return cls(int(torch.empty((), dtype=torch.int64, device="cpu").random_(2**31)), threshold)

    def project(self, inputs: Tensor, down: Tensor, scaling: float) -> Tensor:
        """`scaling * keep(inputs) down^T`."""
        inputs, down = _rows(inputs), down.contiguous()
        tokens, columns = inputs.shape
        output = inputs.new_empty(tokens, len(down))
        _project[(triton.cdiv(tokens, BLOCK_M),)](
            *(inputs, down, output, tokens, columns, inputs.stride(0), len(down)),
            *(scaling, self.seed, self.threshold, _tile(len(down)), BLOCK_M, BLOCK_K),
        )
        return output

    def add_product(self, dx: Tensor, dprojected: Tensor, down: Tensor) -> None:
        """`dx += keep(dprojected down)`, dx being contiguous."""
        tokens, columns = dx.shape
        dprojected, down = dprojected.contiguous(), down.contiguous()
        _add_product[(triton.cdiv(tokens, BLOCK_M), triton.cdiv(columns, BLOCK_K))](
            *(dx, dprojected, down, tokens, columns, len(down)),
            *(self.seed, self.threshold, _tile(len(down)), BLOCK_M, BLOCK_K),
        )

    def gradient(self, dprojected: Tensor, inputs: Tensor) -> Tensor:
        """`dprojected^T keep(inputs)`, fp32 `(r, in)`: partial sums in a fixed order."""
        inputs, dprojected = _rows(inputs), dprojected.contiguous()
        (tokens, columns), rank = inputs.shape, dprojected.shape[1]
        splits = min(SPLITS, triton.cdiv(tokens, BLOCK_M))
        parts = inputs.new_empty(splits, rank, columns, dtype=torch.float32)
        _gradient[(splits, triton.cdiv(columns, BLOCK_K))](
            *(dprojected, inputs, parts, tokens, columns, inputs.stride(0), rank),
            *(self.seed, self.threshold, splits, _tile(rank), BLOCK_M, BLOCK_K),
        )
        return parts.sum(0)


def _rows(inputs: Tensor) -> Tensor:
    return inputs if inputs.stride(1) == 1 else inputs.contiguous()


def _tile(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))  # the smallest side of a product on tensor cores


@triton.jit
def keep_mask(seed, rows, first_column, octets, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`(ROWS, COLUMNS)`: one call of Philox gives 128 bits, which decide about eight neighboring columns.

    `octets` is the number of calls for a row of the input.
    """
    places = first_column // 8 + tl.arange(0, COLUMNS // 8)
    offsets = rows[:, None].to(tl.int64) * octets + places[None, :]
    a, b, c, d = tl.randint4x(seed, offsets)
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    halves = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(halves, (ROWS, COLUMNS)) >= threshold


@triton.jit
def _kept(x, rows, first, tokens, columns, stride, seed, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the input, zero where it is dropped and outside."""
    own = first + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < tokens) & (own[None, :] < columns)
    keep = keep_mask(seed, rows, first, (columns + 7) // 8, threshold, BLOCK_M, BLOCK_K)
    return tl.load(x + rows[:, None].to(tl.int64) * stride + own[None, :], mask=inside & keep, other=0.0)


@triton.jit
def _dot(left, right):
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _project(
    x, down, output, tokens, columns, stride, rank, scaling, seed, threshold,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    total = tl.zeros((BLOCK_M, R), tl.float32)
    for first in range(0, columns, BLOCK_K):
        own = first + tl.arange(0, BLOCK_K)
        tile = _kept(x, rows, first, tokens, columns, stride, seed, threshold, BLOCK_M, BLOCK_K)
        inside = (ranks[None, :] < rank) & (own[:, None] < columns)
        total += _dot(tile, tl.load(down + ranks[None, :] * columns + own[:, None], mask=inside, other=0.0))
    places = output + rows[:, None].to(tl.int64) * rank + ranks[None, :]
    inside = (rows[:, None] < tokens) & (ranks[None, :] < rank)
    tl.store(places, (total * scaling).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _add_product(
    dx, dprojected, down, tokens, columns, rank, seed, threshold,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, ranks = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    first = tl.program_id(1) * BLOCK_K
    own = first + tl.arange(0, BLOCK_K)
    left = tl.load(
        dprojected + rows[:, None].to(tl.int64) * rank + ranks[None, :],
        mask=(rows[:, None] < tokens) & (ranks[None, :] < rank),
        other=0.0,
    )
    right = tl.load(
        down + ranks[:, None] * columns + own[None, :],
        mask=(ranks[:, None] < rank) & (own[None, :] < columns),
        other=0.0,
    )
    product = _dot(left, right)
    keep = keep_mask(seed, rows, first, (columns + 7) // 8, threshold, BLOCK_M, BLOCK_K)
    inside = (rows[:, None] < tokens) & (own[None, :] < columns) & keep
    places = dx + rows[:, None].to(tl.int64) * columns + own[None, :]
    before = tl.load(places, mask=inside, other=0.0)
    tl.store(places, (before + product).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    dprojected, x, parts, tokens, columns, stride, rank, seed, threshold, splits,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split, first, ranks = tl.program_id(0), tl.program_id(1) * BLOCK_K, tl.arange(0, R)
    total = tl.zeros((R, BLOCK_K), tl.float32)
    for start in range(split * BLOCK_M, tokens, splits * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        left = tl.load(
            dprojected + rows[None, :].to(tl.int64) * rank + ranks[:, None],
            mask=(rows[None, :] < tokens) & (ranks[:, None] < rank),
            other=0.0,
        )
        tile = _kept(x, rows, first, tokens, columns, stride, seed, threshold, BLOCK_M, BLOCK_K)
        total += _dot(left, tile)
    own = first + tl.arange(0, BLOCK_K)
    places = parts + (split * rank + ranks[:, None]) * columns + own[None, :]
    tl.store(places, total, mask=(ranks[:, None] < rank) & (own[None, :] < columns))
