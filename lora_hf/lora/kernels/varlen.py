"""Flash attention of concatenated rows on a GPU: torch's kernel, or where it has none flash-attn's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

AMPERE = (8, 0)  # the compute capability from which both kernels run
LARGEST_HEAD, HEAD_STEP = 256, 8  # sizes of a head that both have

# `(query, key, value, ends, longest, scale, is_causal, dropout)`, each vector `(tokens, heads, head_dim)`
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, bool, float], Tensor]


def varlen_kernel(query: Tensor, dropout: float) -> Kernel | None:
    """The kernel for queries `(tokens, heads, head_dim)`; None if there is none for them on this machine."""
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    if size > LARGEST_HEAD or size % HEAD_STEP or not _is_new_enough(query.device):
        return None
    return _kernel(dropout > 0)


@functools.cache
def _is_new_enough(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= AMPERE


@functools.cache
def _kernel(drops: bool) -> Kernel | None:
    """torch's kernel, which cannot drop attention weights; else flash-attn's, which can."""
    torchs: Any = getattr(_imported("torch.nn.attention.varlen"), "varlen_attn", None)
    if torchs is not None and not drops:
        known = inspect.signature(torchs).parameters
        if {"scale", "window_size"} <= known.keys():  # before torch 2.11 it had neither
            return functools.partial(_torchs, torchs, "enable_gqa" in known)
    flash: Any = getattr(_imported("flash_attn"), "flash_attn_varlen_func", None)
    return None if flash is None else functools.partial(_flash_attns, flash)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError):  # also a build for another torch
        return None


def _torchs(
    varlen_attn: Any,
    shares_keys: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scale: float,
    is_causal: bool,
    dropout: float,
) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and not shares_keys:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    options: dict[str, Any] = {"enable_gqa": True} if shared > 1 and shares_keys else {}
    window = (-1, 0 if is_causal else -1)
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=window, **options)


def _flash_attns(
    flash: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scale: float,
    is_causal: bool,
    dropout: float,
) -> Tensor:
    return flash(
        query, key, value, ends, ends, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=is_causal
    )
