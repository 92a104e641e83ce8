"""A real encoder on real rows: scores equal scikit-learn's, and PEFT with the Trainer ends with the same logits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_hf.data.tasks.registry import task_of
from tests.tolerances import TRAINED_LOGITS_SHARE
from tools.benchmark.labels import EPOCHS, config_of, scores, train_both

pytestmark = pytest.mark.full

TRAIN_ROWS, VALIDATION_ROWS = 160, 40  # 10 steps


@pytest.mark.parametrize("name", EPOCHS)
def test_scores_equal_those_of_peft(name: str, real_models: Path, data_dir: Path, tmp_path: Path) -> None:
    logging.getLogger("lora_hf").setLevel(logging.ERROR)
    config = config_of(name, str(real_models / "minilm"), str(data_dir), tmp_path, TRAIN_ROWS)
    config = replace(config, train=replace(config.train, epochs=1))
    both = train_both(config, VALIDATION_ROWS)
    assert both.run.record.rows == {"train": TRAIN_ROWS, "validation": VALIDATION_ROWS}
    for metric, value in scores(task_of(config.task), both.ours, both.validation).items():
        assert both.run.record.metrics["validation"][metric] == pytest.approx(value, abs=1e-6), metric
    off = np.abs(both.ours - both.peft).max(axis=0)
    assert (off < TRAINED_LOGITS_SHARE * both.ours.std(axis=0)).all(), "the same rows, order and initial weights"
