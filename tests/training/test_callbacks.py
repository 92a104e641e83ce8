"""Lines of progress on standard error, where no bar is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_hf.core import progress
from lora_hf.core.config.loader import load_config
from lora_hf.core.progress import PROGRESS_INTERVAL
from lora_hf.data.tasks.registry import get_task
from lora_hf.training.callbacks import ProgressLines
from lora_hf.training.run import train


def test_a_line_shows_the_step_the_loss_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    state, control = TrainerState(), TrainerControl()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    state.global_step, state.max_steps = 200, 1400  # it goes on from a checkpoint: only 100 steps took these 60 s
    lines = ProgressLines("rte, ")
    lines.on_train_begin(arguments, state, control)

    def log(**logs: float) -> str:
        lines.on_log(arguments, state, control, logs)
        return capsys.readouterr().err

    now += PROGRESS_INTERVAL - 1
    state.global_step = 250
    assert log(loss=0.7) == ""
    now = 160.0
    state.global_step = 300
    assert log(eval_loss=0.6) == ""
    assert log(loss=0.61239) == "rte, 300 of 1,400 steps: loss 0.6124, 11.0 min left\n"
    assert log(loss=0.6) == ""
    state.is_world_process_zero = False
    now += PROGRESS_INTERVAL
    assert log(loss=0.6) == ""


def test_a_run_without_a_terminal_prints_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PROGRESS_INTERVAL", 0.0)
    task = get_task("rule-sentiment")
    rows = {split: part.select(range(24)) for split, part in task.load(None, task.splits).items()}
    words = ["model.precision=fp32", "train.hf={use_cpu: true}", "train.batch_size=8", "train.max_steps=3"]
    words += [f"output.dir={tmp_path}", "output.plots=false"]
    train(load_config("rule_sentiment.yaml", words), rows=rows)
    out, err = capsys.readouterr()
    assert out == ""
    training, validation, steps, *rest = err.splitlines()
    assert training.startswith("train: 24 rows; tokens: median ")
    assert validation.startswith("validation: 24 rows; tokens: ")
    assert re.fullmatch(r"3 steps; trains [\d,]+ of [\d,]+ parameters; fp32 on cpu", steps)
    assert sum(line.startswith("training takes about ") for line in rest) == 1
    assert [line.split(":")[0] for line in rest if " steps: loss " in line] == [
        f"{step} of 3 steps" for step in (1, 2, 3)
    ]


def test_a_long_evaluation_prints_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    state, control, arguments = TrainerState(), TrainerControl(), TrainingArguments(str(tmp_path), use_cpu=True)
    lines = ProgressLines("rte, ")
    lines.on_train_begin(arguments, state, control)
    for _ in range(2):  # the second evaluation counts from 0
        for _ in range(3):
            now += PROGRESS_INTERVAL / 2 + 1
            lines.on_prediction_step(arguments, state, control, eval_dataloader=range(3))
        lines.on_evaluate(arguments, state, control)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"rte, evaluating: {batch} of 3 batches" for batch in (2, 1, 3)]
