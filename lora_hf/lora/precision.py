"""In which precision weights are held, a frozen base's and what is trained; what `auto` means; what counts as zero."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

SIZE = 768  # of the probe's matrices: a projection of roberta-base or gpt2
FASTER = 1.2  # how much faster bf16 must be to be worth its rounding


def resolve_precision(precision: str) -> Precision:
    """The precision itself; for `auto` bf16 where that is faster here, else fp32."""
    if precision != "auto":
        return precision  # type: ignore[return-value]
    return "bf16" if bf16_gain() >= FASTER else "fp32"


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Numbers below fp32's smallest normal one, 1.2e-38, count as zero on the CPU until the end; also a decorator.

    Attention that has settled on few tokens gives the others gradients of that size, and a processor takes a hundred
    times longer to multiply them. The setting is that of the calling thread and of those which it starts from then on,
    as torch starts its own at the first large operation.
    """
    before = (torch.tensor(1e-30, device="cpu") * 1e-10).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@functools.cache
@flush_denormals()
def bf16_gain() -> float:
    """How many times faster than fp32 this machine multiplies bf16 matrices; probed once, in milliseconds.

    A GPU is asked, not timed: every one that has bf16 units is faster with them.
    """
    if torch.cuda.is_available():
        return 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    seconds = {dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.float32] / seconds[torch.bfloat16]


def keep_dtype(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of `Module.to`, `.half()`, ... without its cast: the tensor follows to the device and stays exact."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def _seconds(dtype: torch.dtype, tries: int = 5) -> float:
    x, weight = torch.ones(256, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(tries):  # the first is warm-up; the fastest is the one nothing else disturbed
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best
