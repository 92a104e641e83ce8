"""Attention of concatenated rows without gradients: row by row, as the padded rows give it."""

from __future__ import annotations

import pytest
import torch

from lora_hf.lora.kernels.attention import Rows, attend_rows
from tests import tolerances

LENGTHS = (5, 1, 9, 5)
SIZE = 8


def rows_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """The same in double precision, with the softmax written out."""
    query, key, value = query.double(), key.double(), value.double()
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    parts = []
    for q, k, v in zip(*(each.split(LENGTHS, 1) for each in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) / SIZE**0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_each_row_attends_to_itself_alone(key_heads: int, is_causal: bool, gradients: bool) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    query = torch.randn(tokens, 4, SIZE).transpose(0, 1)
    key, value = (torch.randn(tokens, key_heads, SIZE).transpose(0, 1) for _ in "kv")
    with torch.set_grad_enabled(gradients):
        found = attend_rows(query, key, value, Rows(LENGTHS), is_causal=is_causal)
    expected = rows_alone(query, key, value, is_causal)
    limit = tolerances.FUSED_RTOL[torch.float32] * expected.abs().max()
    assert (found.double() - expected).abs().max() < limit


def test_nan_in_one_row_stays_there() -> None:
    query, key, value = torch.randn(3, 4, sum(LENGTHS), SIZE)
    key[:, :5] = torch.nan
    with torch.no_grad():
        found = attend_rows(query, key, value, Rows(LENGTHS))
    assert found[:5].isnan().all()
    assert not found[5:].isnan().any()
