"""Every GLUE task trains and scores on real rows, with the bundled base and a few steps."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from lora_hf.core.config.loader import load_config
from lora_hf.data.metrics.glue import METRIC_NAMES
from lora_hf.data.tasks.glue import GLUE
from lora_hf.data.tasks.registry import get_task
from lora_hf.training.run import train
from tests.tolerances import ACCUMULATION_FP32

pytestmark = pytest.mark.full

ROWS = 48


@pytest.mark.parametrize("name", [task.name for task in GLUE])
def test_the_recipe_of_every_task_trains_and_scores(name: str, data_dir: Path, tmp_path: Path) -> None:
    words = ["model.name=tiny-roberta", f"task.data_dir={data_dir}", "train.max_steps=3", "train.batch_size=8"]
    config = load_config(
        f"glue_{name}.yaml", [*words, f"output.dir={tmp_path}", "output.plots=false", "task.max_length=128"]
    )
    task = get_task(name)
    rows = {split: part.select(range(ROWS)) for split, part in task.load(str(data_dir), task.splits).items()}
    record = train(config, rows=rows).record
    assert set(record.metrics) == set(task.evaluation_splits)
    for split, scores in record.metrics.items():
        assert tuple(scores) == METRIC_NAMES[name]
        assert len(list(tmp_path.glob(f"*/predictions-{split}.jsonl"))) == 1
    if name == "stsb":
        (file,) = tmp_path.glob("*/predictions-validation.jsonl")
        lines = map(json.loads, file.read_text().splitlines())
        squares = [(line["prediction"] - line["label"]) ** 2 for line in lines]
        (loss,) = {entry["eval_validation_loss"] for entry in record.history if "eval_validation_loss" in entry}
        assert loss == pytest.approx(statistics.fmean(squares), rel=ACCUMULATION_FP32), (
            "a squared error, of any start of the head"
        )
        assert loss > 1, "on a scale of 0 to 5, and no cross-entropy of one class"
    if name == "mnli":
        assert set(record.metrics) == {"validation_matched", "validation_mismatched"}
