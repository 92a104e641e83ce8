"""The Triton kernels equal the reference in Triton's interpreter: output and every gradient, in odd shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hf.core.errors import ConfigError
from lora_hf.lora.kernels import fused
from tests.tolerances import FUSED_RTOL

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_dropout"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_output_and_every_gradient_are_the_references(found: dict[str, Any]) -> None:
    for case, differences in found["differences"].items():
        tolerance = FUSED_RTOL[getattr(torch, case.rpartition(", ")[2])]
        assert max(differences["right"].values()) < tolerance, case
        if not case.startswith("one token"):  # where two seeds may keep the same five elements
            assert min(differences["wrong"][name] for name in ("y", "x", "A")) > tolerance, f"{case}: any mask passes"


@needs_triton
def test_elements_are_kept_with_their_probability_and_independently(found: dict[str, Any]) -> None:
    count, keep = 400 * 1001, 0.7
    assert abs(found["share"] - keep) < 5 * (keep * (1 - keep) / count) ** 0.5
    for distance, together in found["neighbors"].items():
        assert abs(together) < 5 * keep * (1 - keep) / count**0.5, distance


@needs_triton
def test_no_mask_is_stored(found: dict[str, Any]) -> None:
    assert found["mask bytes"] == 0


def test_they_are_off_by_default_and_their_absence_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_HF_TRITON", raising=False)
    fused._philox.cache_clear()
    assert fused._philox() is None
    monkeypatch.setenv("LORA_HF_TRITON", "1")
    monkeypatch.setitem(sys.modules, "lora_hf.lora.kernels.philox", None)
    fused._philox.cache_clear()
    with pytest.raises(ConfigError, match="LORA_HF_TRITON=1 needs triton"):
        fused._philox()
    fused._philox.cache_clear()
