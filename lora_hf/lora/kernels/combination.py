"""How low-rank updates are combined: sums of factors, the nearest matrix of a rank, TIES and DARE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A (r, in) and B (out, r) of the matrix B A
Svd = tuple[Tensor, Tensor, Tensor]  # U (out, k), the k singular values, V (k, in)


def sum_of_factors(factors: Sequence[Factors]) -> Factors:
    """The factors of `sum_i B_i A_i`: the A stacked and the B concatenated; their rank is the sum of the ranks."""
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)


def svd_of_factors(a: Tensor, b: Tensor) -> Svd:
    """The singular value decomposition of B A in float64, through matrices no larger than its factors.

    With `B = Q_b R_b` and `A^T = Q_a R_a`, the small `R_b R_a^T = U S V` gives `(Q_b U) S (V Q_a^T)`.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, v @ q_a.T


def shorten(svd: Svd, rank: int) -> tuple[Factors, float, float]:
    """The nearest matrix of at most `rank` in the Frobenius norm (Eckart and Young, 1936).

    Returns:
        Its fp32 factors, each with the roots of the singular values; the squared norm of the rest; that of the whole.
    """
    u, s, v = svd
    root = s[:rank].sqrt()
    factors = (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()
    return factors, float(s[rank:].square().sum()), float(s.square().sum())


def trim(delta: Tensor, threshold: Tensor) -> Tensor:
    """The entries of magnitude `threshold` or more, zero elsewhere (TIES, arXiv 2306.01708, step 1)."""
    return delta.where(delta.abs() >= threshold, 0.0)


def elect(deltas: Sequence[Tensor]) -> Tensor:
    """For each entry the mean of the values whose sign is that of the sum (TIES, steps 2 and 3)."""
    stacked = torch.stack(list(deltas))
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (sign != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps each entry with probability `density`, divided by it, so the mean is `delta` (DARE, arXiv 2311.03099)."""
    mask = torch.rand(delta.shape, generator=generator) < density  # on the CPU: the same draw on every machine
    return delta * mask.to(delta.device) / density
