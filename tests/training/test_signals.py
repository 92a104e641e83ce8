"""A signal stops a run within one batch, also in an evaluation, and nothing that was trained is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from lora_hf.core.errors import Interrupted
from lora_hf.core.records import RECORD_FILE
from lora_hf.training.checkpoints import checkpoints_in, find_damage, read_progress
from lora_hf.training.run import train
from tests.support.kills import differences, small_config, small_rows

# Evaluations after steps 4, 8, 12 and 16; a checkpoint after each. Each evaluation has two batches.
EVERY = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4, "logging_steps": 1}
FINAL = 16


class InEvaluation(TrainerCallback):
    """Sends a signal in the first batch of the evaluation at `step`, and counts the batches after it."""

    def __init__(self, step: int, kind: signal.Signals) -> None:
        self.step, self.kind = step, kind
        self.batches = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.batches += 1
            if self.batches == 1:
                signal.raise_signal(self.kind)


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return small_rows()


@pytest.mark.full
@pytest.mark.parametrize(
    ("step", "kind", "more"),
    [
        (4, signal.SIGINT, {}),
        (8, signal.SIGTERM, {}),  # the end of an epoch
        (8, signal.SIGTERM, {"hf": {}}),  # evaluated at each end of an epoch
        (FINAL, signal.SIGTERM, {}),
        (8, signal.SIGTERM, {"patience": 1, "lr": 1e-9}),  # its evaluation is the one that ends the run
        (8, signal.SIGTERM, {"method": "full", "lr": 1e-4}),
    ],
)
def test_a_signal_in_an_evaluation_saves_and_the_run_goes_on(
    step: int, kind: signal.Signals, more: dict[str, Any], rows: dict[str, Any], tmp_path: Path
) -> None:
    more = {"hf": EVERY, "eval_batch_size": 10, **more}
    whole = train(small_config(tmp_path / "whole", **more), rows=rows)
    stopper = InEvaluation(step, kind)
    with pytest.raises(Interrupted, match=f"{kind.name}: resume after step {step}"):
        train(small_config(tmp_path, **more), rows=rows, callbacks=[stopper])
    assert stopper.batches == 1, "not even the next batch is evaluated"
    folder = tmp_path / "run"
    newest = checkpoints_in(folder / "checkpoints")[0]
    assert newest.name == f"checkpoint-{step}"
    assert read_progress(newest)["evaluation_due"]
    # A second signal, in the evaluation that is repeated, changes nothing.
    with pytest.raises(Interrupted, match=f"resume after step {step}"):
        train(small_config(tmp_path, **more), "auto", rows, callbacks=[InEvaluation(step, kind)])
    assert not find_damage(newest)
    resumed = train(small_config(tmp_path, **more), "auto", rows)
    found = differences(whole, resumed.folder)
    assert [each for each in found if not each.endswith("training_args.bin")] == [], "that file holds the folder"
    assert resumed.record.best == whole.record.best


@pytest.mark.full
def test_a_signal_in_the_first_evaluation_loses_no_step(rows: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(tmp_path, hf=EVERY, eval_batch_size=10, max_steps=5)
    with pytest.raises(Interrupted, match="resume after step 4"):
        train(config, rows=rows, callbacks=[InEvaluation(4, signal.SIGTERM)])
    assert not (tmp_path / "run" / RECORD_FILE).exists()
    run = train(config, "auto", rows)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if any(key.startswith("eval_") for key in line)]
    assert evaluated == [entry["step"] for entry in run.record.history if "eval_validation_loss" in entry]
    assert evaluated[0] == 4
    assert len(set(evaluated)) == len(evaluated)


def test_a_signal_before_the_first_step_saves_nothing(rows: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(tmp_path, hf={**EVERY, "eval_on_start": True}, max_steps=4)
    with pytest.raises(Interrupted, match="start again"):
        train(config, rows=rows, callbacks=[InEvaluation(0, signal.SIGTERM)])
    assert not checkpoints_in(tmp_path / "run" / "checkpoints")
