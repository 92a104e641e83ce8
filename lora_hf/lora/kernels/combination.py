"""What combining low-rank updates comes down to: sums of factors, their nearest matrices of a rank, TIES and DARE."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Factors = tuple[torch.Tensor, torch.Tensor]  # A (r, in) and B (out, r) of the matrix B A
Svd = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U (out, k), the k singular values, V (k, in)


def sum_of_factors(factors: Sequence[Factors]) -> Factors:
    """The factors of `sum_i B_i A_i`: the A stacked and the B side by side, so the rank is the sum of the ranks."""
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)


def svd_of_factors(a: torch.Tensor, b: torch.Tensor) -> Svd:
    """The singular value decomposition of B A in float64, through matrices no larger than its factors.

    With `B = Q_b R_b` and `A^T = Q_a R_a`, the small `R_b R_a^T = U S V` gives `(Q_b U) S (V Q_a^T)`.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, v @ q_a.T


def shorten(svd: Svd, rank: int) -> tuple[Factors, float, float]:
    """The nearest matrix of at most `rank` in the Frobenius norm (Eckart and Young, 1936), as fp32 factors.

    Returns:
        Its factors, the singular values shared evenly between them; the squared norm that is left out; that of all.
    """
    u, s, v = svd
    root = s[:rank].sqrt()
    factors = (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()
    return factors, float(s[rank:].square().sum()), float(s.square().sum())


def trim(delta: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """The entries whose magnitude is at least `threshold`, zero elsewhere (TIES, arXiv 2306.01708, step 1)."""
    return delta.where(delta.abs() >= threshold, 0.0)


def elect(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """At each entry the sign of the sum, and the mean of the entries that have it (TIES, steps 2 and 3)."""
    stacked = torch.stack(list(deltas))
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (sign != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def drop(delta: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Each entry kept with probability `density` and divided by it: the expectation is `delta` (DARE, 2311.03099)."""
    kept = torch.rand(delta.shape, generator=generator) < density  # on the CPU: the same draw on every machine
    return delta * kept.to(delta.device) / density
