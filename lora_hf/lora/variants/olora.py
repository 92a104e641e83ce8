"""OLoRA: A and B start as the first part of the QR decomposition of the weight, arXiv 2406.01775, section 3.1."""

from __future__ import annotations

import torch


def orthonormal_factors(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(r, in)`, the first rows of R, and B `(out, r)`, the first columns of Q, of `weight = Q R`, `(out, in)`."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()
