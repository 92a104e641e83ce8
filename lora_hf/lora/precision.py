"""The precision of weights: resolves `auto`, keeps LoRA in fp32 through casts, and flushes denormals to zero."""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

Precision = Literal["fp32", "bf16", "fp16"]

SIZE = 768  # of the matrices that are timed: a projection of roberta-base or gpt2
REPEATS = 20  # of each product
FASTER = 1.2  # how many times faster bf16 must be to be worth its rounding


def resolve_precision(precision: str) -> Precision:
    """Resolves `auto` to bf16 if that is faster on this machine, else to fp32; returns other precisions unchanged."""
    if precision != "auto":
        return precision  # type: ignore[return-value]
    return "bf16" if bf16_gain() >= FASTER else "fp32"


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Inside, numbers below fp32's smallest normal one, 1.2e-38, count as zero on the CPU; also a decorator.

    Attention that has settled on few tokens gives the others gradients of that size, and a processor takes a hundred
    times longer to multiply them. The setting is that of the calling thread and of the threads that it starts later, as
    torch does at the first large operation.
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
    """The speedup of bf16 matrix products over fp32 on this machine. Measured once, which takes milliseconds.

    A GPU is not timed: every one with bf16 units is faster with them.
    """
    if torch.cuda.is_available():
        return 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    fp32, bf16 = _product(torch.float32), _product(torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other programs may take the cores: then threads wait for each other
    try:
        seconds = [(timeit.timeit(fp32, number=1), timeit.timeit(bf16, number=1)) for _ in range(REPEATS)]
    finally:
        torch.set_num_threads(threads)
    return min(slow for slow, _ in seconds) / min(fast for _, fast in seconds)


def cast_leftovers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts parameters that their class creates in fp32 whatever the dtype, as DeBERTa's and XLNet's do."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for path, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and kept.isdisjoint(path.split(".")):
            parameter.data = parameter.data.to(dtype)


def keep_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps the `fn` of `Module.to`, `.half()` and so on: the tensor moves to the device but keeps its dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def _product(dtype: torch.dtype) -> Callable[[], Tensor]:
    x, weight = torch.ones(256, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    return lambda: torch.nn.functional.linear(x, weight)
