"""PiSSA: A and B start as the principal part of the weight, arXiv 2404.02948, equations 2 to 4.

`W = U S V^T` gives `B_0 = U_r sqrt(S_r / scaling)` and `A_0 = sqrt(S_r / scaling) V_r^T`, so that `scaling * B_0 A_0`
is the best approximation of W with rank r; the weight beside it is the rest, `W - scaling * B_0 A_0`.
"""

from __future__ import annotations

import torch


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
