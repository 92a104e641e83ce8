"""A and B that start as a part of the base weight (PiSSA, OLoRA), on a base that is never touched.

The papers subtract the start from the weight: `y = (W - scaling * B_0 A_0) x + scaling * B A x`. Here W stays as it is
and `scaling * (B A - B_0 A_0) x` is added, which is the same. So the base needs no second copy, other adapters, the
fingerprint and mixed batches meet the weights they know, and the file is a plain LoRA on the original base.

The difference is multiplied as `B (A - A_0) + (B - B_0) A_0`, a product of rank 2r in which nothing large cancels: at
the start it is exactly zero, and in bf16 a small step is rounded as itself, not as a part of the principal weights.
Its gradients are those of `B A`.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_hf.lora.layers import LoraWeights


class DecomposedWeights(LoraWeights):
    """LoRA's A and B with the values they started from, `start_a` and `start_b`, which are never trained."""

    start_a: torch.Tensor
    start_b: torch.Tensor

    def __init__(self, start: str, *plain: Any, **named: Any) -> None:
        super().__init__(*plain, **named)
        self.start = start
        self.register_buffer("start_a", torch.zeros_like(self.lora_A))
        self.register_buffer("start_b", torch.zeros_like(self.lora_B))

    @torch.no_grad()
    def begin(self, weight: torch.Tensor) -> None:
        """Takes the start from the base weight, fp32 `(out, in)`: each slice from its own rows."""
        pairs = [self._start_of(weight[start:stop]) for start, stop in self.slices]
        self.start_a.copy_(torch.cat([a for a, _ in pairs]))
        self.start_b.copy_(torch.cat([b for _, b in pairs]))
        self.lora_A.copy_(self.start_a)
        self.lora_B.copy_(self.start_b)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[A - A_0; A_0]` and `[B, B - B_0]`, of rank 2r."""
        return self._stacked(self.lora_A - self.start_a), torch.cat([self.lora_B, self.lora_B - self.start_b], 1)

    def saved_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[A; A_0]` and `[B, -B_0]`, as PEFT converts them, from which the four come back bit for bit."""
        return self._stacked(self.lora_A), torch.cat([self.lora_B, -self.start_b], 1)

    def load_factors(self, a: torch.Tensor, b: torch.Tensor) -> None:
        trained, start = a.view(len(self.slices), 2, self.r, a.shape[1]).unbind(1)
        self.lora_A.copy_(trained.reshape_as(self.lora_A))
        self.start_a.copy_(start.reshape_as(self.start_a))
        self.lora_B.copy_(b[:, : self.r])
        self.start_b.copy_(-b[:, self.r :])

    def moved(self) -> bool:
        return not torch.equal(self.lora_B, self.start_b)

    def _start_of(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.start == "olora":
            return orthonormal_factors(weight, self.r)
        _, _, iterations = self.start.partition("_niter_")
        return principal_factors(weight, self.r, self.scaling, int(iterations) if iterations else None)

    def _stacked(self, a: torch.Tensor) -> torch.Tensor:
        """`a` over the start of A, slice by slice."""
        shape = (len(self.slices), self.r, a.shape[1])
        return torch.cat([a.view(shape), self.start_a.view(shape)], 1).flatten(0, 1)


def principal_factors(
    weight: torch.Tensor, r: int, scaling: float, iterations: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(r, in)` and B `(out, r)` of the principal part of `weight`, fp32 `(out, in)`.

    Args:
        iterations: of a randomised SVD, which is many times faster (section 3); without, the exact one.
    """
    if iterations is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=iterations)
        vt = v.T
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root


def orthonormal_factors(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(r, in)`, the first rows of R, and B `(out, r)`, the first columns of Q, of `weight = Q R`, `(out, in)`."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()
