"""LoRA+: B learns faster than A, `lr_B = ratio * lr_A`, arXiv 2402.12354, section 4; the paper advises about 16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def apply_loraplus(optimizer: torch.optim.Optimizer, faster: Iterable[nn.Parameter], ratio: float) -> None:
    """Moves parameters of an optimiser into groups of their own, with `ratio` times the learning rate.

    A group that held them keeps the rest, and the new one has its other settings; a schedule scales both alike.
    """
    chosen = set(faster)
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in chosen]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * ratio})
