"""PiSSA and OLoRA: A and B start as a part of the base weight, and the base stays unchanged.

The papers subtract the start from the weight: `y = (W - scaling * B_0 A_0) x + scaling * B A x`. Here W stays as it is
and `scaling * (B A - B_0 A_0) x` is added, which is the same. So other adapters, the fingerprint and mixed batches use
the same base, and the file is a plain LoRA on the original base.

The difference is multiplied as `B (A - A_0) + (B - B_0) A_0`, a product of rank 2r in which nothing large cancels: at
the start it is exactly zero, and bf16 rounds a small step by its own size, not by that of the principal weights. Its
gradients are those of `B A`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_hf.lora.layers import LoraWeights
from lora_hf.lora.slices import slice_columns


class DecomposedWeights(LoraWeights):
    """LoRA's A and B, and the values they started from: the buffers `start_a` and `start_b`."""

    start_a: Tensor
    start_b: Tensor

    def __init__(self, start: str, *plain: Any) -> None:
        super().__init__(*plain)
        self.start = start
        self.register_buffer("start_a", torch.zeros_like(self.lora_A))
        self.register_buffer("start_b", torch.zeros_like(self.lora_B))

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Computes the start from the base weight, fp32 `(out, in)`: that of each slice from its own rows."""
        pairs = [self._decompose(weight[slice_columns(piece)]) for piece in self.slices]
        self.start_a.copy_(torch.cat([a for a, _ in pairs]))
        self.start_b.copy_(torch.cat([b for _, b in pairs]))
        self.lora_A.copy_(self.start_a)
        self.lora_B.copy_(self.start_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`[A - A_0; A_0]` and `[B, B - B_0]`, of rank 2r."""
        return self._interleave(self.lora_A - self.start_a), torch.cat([self.lora_B, self.lora_B - self.start_b], 1)

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """`[A; A_0]` and `[B, -B_0]`, as PEFT converts them; all four can be read back bit for bit."""
        return self._interleave(self.lora_A), torch.cat([self.lora_B, -self.start_b], 1)

    def load_factors(self, a: Tensor, b: Tensor) -> None:
        trained, start = a.view(len(self.slices), 2, self.r, a.shape[1]).unbind(1)
        self.lora_A.copy_(trained.reshape_as(self.lora_A))
        self.start_a.copy_(start.reshape_as(self.start_a))
        self.lora_B.copy_(b[:, : self.r])
        self.start_b.copy_(-b[:, self.r :])

    def moved(self) -> bool:
        return not torch.equal(self.lora_B, self.start_b)

    def _decompose(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.start == "olora":
            return orthonormal_factors(weight, self.r)
        _, _, iterations = self.start.partition("_niter_")
        return principal_factors(weight, self.r, self.scaling, int(iterations) if iterations else None)

    def _interleave(self, a: Tensor) -> Tensor:
        """`a` above the start of A, slice by slice."""
        shape = (len(self.slices), self.r, a.shape[1])
        return torch.cat([a.view(shape), self.start_a.view(shape)], 1).flatten(0, 1)


def principal_factors(weight: Tensor, r: int, scaling: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A `(r, in)` and B `(out, r)` of the principal part of `weight`, fp32 `(out, in)` (PiSSA, arXiv 2404.02948).

    Args:
        iterations: those of a randomized SVD, which is many times faster (section 3); None is the exact SVD.
    """
    if iterations is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=iterations)
        vt = v.T
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root


def orthonormal_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A `(r, in)`: the first rows of R, B `(out, r)`: the first columns of Q, of `weight = Q R` (arXiv 2406.01775)."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()
