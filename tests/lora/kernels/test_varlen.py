"""The flash kernels of a GPU, with a plain stand-in for each: which one is chosen, and what it is asked for."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from lora_hf.lora.kernels import attention, varlen
from lora_hf.lora.kernels.attention import Rows, attend_rows
from tests.tolerances import PADDING_FREE_FP32

LENGTHS = (7, 3, 5)


def by_row(query: Any, key: Any, value: Any, ends: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """`(tokens, heads, head_dim)` each, with as many key heads as the kernel shares."""
    parts = []
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        made = scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=True)
        parts.append(made.transpose(0, 1))
    return torch.cat(parts)


def torchs(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
) -> torch.Tensor:
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == max(LENGTHS)
    assert enable_gqa or query.shape == key.shape
    return by_row(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def torchs_without_shared_keys(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
) -> torch.Tensor:
    return torchs(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def flash(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
) -> torch.Tensor:
    return by_row(q, k, v, cu_seqlens_q, softmax_scale, causal)


@pytest.fixture(autouse=True)
def _chosen_anew():
    varlen._kernel.cache_clear()
    yield
    varlen._kernel.cache_clear()


@pytest.mark.parametrize("kernel", [torchs, torchs_without_shared_keys, flash])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_each_kernel_gives_the_grouped_rows(kernel, causal: bool, key_heads: int, monkeypatch) -> None:
    modules = {"torch.nn.attention.varlen": SimpleNamespace(varlen_attn=kernel)}
    if kernel is flash:
        modules = {"flash_attn": SimpleNamespace(flash_attn_varlen_func=kernel)}
    monkeypatch.setattr(varlen, "_imported", modules.get)
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, 15, 8) for heads in (4, key_heads, key_heads))
    wanted = attend_rows(q, k, v, Rows(LENGTHS), scale=0.3, is_causal=causal)
    monkeypatch.setattr(attention, "varlen_kernel", lambda query, dropout: varlen._kernel(dropout > 0))
    found = attend_rows(q, k, v, Rows(LENGTHS), scale=0.3, is_causal=causal)
    torch.testing.assert_close(found, wanted, atol=PADDING_FREE_FP32, rtol=0)


def test_only_flash_attn_drops_weights(monkeypatch) -> None:
    modules = {"torch.nn.attention.varlen": SimpleNamespace(varlen_attn=torchs)}
    monkeypatch.setattr(varlen, "_imported", modules.get)
    assert varlen._kernel(False).func is varlen._torchs
    assert varlen._kernel(True) is None
    modules["flash_attn"] = SimpleNamespace(flash_attn_varlen_func=flash)
    varlen._kernel.cache_clear()
    assert varlen._kernel(False).func is varlen._torchs
    assert varlen._kernel(True).func is varlen._flash_attns


def test_a_broken_flash_attn_is_none(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # an import raises ImportError
    assert varlen._kernel(True) is None


def test_this_torchs_kernel_takes_what_it_is_given() -> None:
    kernel = varlen._kernel(False)
    assert kernel is not None
    inspect.signature(varlen_attn).bind(
        *[None] * 7, scale=1.0, window_size=(-1, 0), **({"enable_gqa": True} if kernel.args[1] else {})
    )


def test_the_cpu_has_no_flash_kernel() -> None:
    assert varlen.varlen_kernel(torch.zeros(3, 2, 8, dtype=torch.bfloat16), 0.0) is None
