"""A real encoder on real rows: scores equal scikit-learn's, and PEFT with the Trainer reaches the same ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tools.benchmark.labels import EPOCHS, compare_with_peft, config_of

pytestmark = pytest.mark.full

HALF_A_POINT = 0.005


@pytest.mark.parametrize("name", EPOCHS)
def test_scores_equal_those_of_peft(name: str, real_models: Path, data_dir: Path, tmp_path: Path) -> None:
    logging.getLogger("lora_hf").setLevel(logging.ERROR)
    found = compare_with_peft(config_of(name, str(real_models / "minilm"), str(data_dir), tmp_path))
    assert found["rows"]["train"] == (800 if name == "topics" else 2000)
    for metric, value in found["ours"].items():
        assert found["recorded"][metric] == pytest.approx(value, abs=1e-6), "scikit-learn's and scipy's"
        assert found["peft"][metric] == pytest.approx(value, abs=HALF_A_POINT), metric
