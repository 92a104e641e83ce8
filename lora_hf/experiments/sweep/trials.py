"""One trial of a sweep: a run like any other, watched by the pruner, and what stays of it on the disk."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from datasets import Dataset
from optuna.trial import FrozenTrial, Trial, TrialState
from transformers import TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import TrainingError
from lora_hf.core.records import RECORD_FILE, RUN_CONFIG_FILE
from lora_hf.data.tasks.base import Task
from lora_hf.experiments.sweep.storage import ERROR
from lora_hf.training.run import LOG_FILE, train

PRECISION = "precision"  # the attribute of a trial that says what `model.precision: auto` was
KEPT = (
    RECORD_FILE,
    RUN_CONFIG_FILE,
    LOG_FILE,
    "curves.png",
)  # of every trial; the best keeps everything but checkpoints


class TrialFailed(Exception):  # noqa: N818
    """A trial that could not be trained to its end; the sweep goes on."""


class Report(TrainerCallback):
    """Tells the pruner the development score after each evaluation, and stops the run where the pruner says so.

    Evaluations are numbered from 1, so that trials of other batch sizes or lengths still meet: the second evaluation of
    one is compared with the second of the others.
    """

    def __init__(self, trial: Trial, score: str) -> None:
        self.trial, self.score = trial, score
        self.evaluations = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        if self.score not in metrics:
            return  # another evaluation split
        self.evaluations += 1
        self.trial.report(metrics[self.score], self.evaluations)
        # The last evaluation ends the run anyway; pruned there, it would lose its place among the complete ones.
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned


def run_trial(trial: Trial, config: RunConfig, task: Task, rows: Mapping[str, Dataset]) -> float:
    """Trains as the config says and returns the task's best metric on its first evaluation split.

    Raises:
        TrialPruned: the pruner stopped the run.
        TrialFailed: it does not train, or does not fit the GPU.
        UserError: whatever is wrong with the config or the data, and so with every trial.
    """
    split = task.evaluation_splits[0]
    report = Report(trial, f"eval_{split}_{task.best_metric}")
    try:
        record = train(config, rows=rows, callbacks=[report]).record
        value, failure = record.metrics[split][task.best_metric], ""
        trial.set_user_attr(PRECISION, record.config["model"]["precision"])
        if not math.isfinite(value):
            failure = f"{split} {task.best_metric} is {value}"
    except (TrainingError, torch.OutOfMemoryError) as error:
        value, failure = math.nan, str(error).partition("\n")[0]
    if failure:  # out of the except block, whose error holds the model through its traceback
        trial.set_user_attr(ERROR, failure)
        raise TrialFailed(failure)
    return value


def free_memory() -> None:
    """Lets go of the model of the trial before, which lies in circles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trial_folder(number: int) -> str:
    """Its name in the folder of the study."""
    return f"trial-{number}"


def best_trial(trials: Sequence[FrozenTrial], maximise: bool) -> FrozenTrial | None:
    """The complete trial with the best value, the first of equals; None where none is complete."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(complete, key=lambda trial: ((trial.value or 0) * (-1 if maximise else 1), trial.number), default=None)


def tidy(folder: Path, trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> None:
    """Removes the checkpoints of all finished trials, and of all but the best the weights and predictions too.

    Several processes may do so at once: a finished trial that is not the best now will never be.
    """
    for trial in trials:
        place = folder / trial_folder(trial.number)
        if not trial.state.is_finished() or not place.is_dir():
            continue
        for entry in place.iterdir():
            is_best = best is not None and trial.number == best.number
            if entry.name == "checkpoints" or not (is_best or entry.name in KEPT):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
