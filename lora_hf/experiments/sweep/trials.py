"""One trial of a sweep: a training run that the pruner can stop, and which of its files are kept."""

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

PRECISION = "precision"  # attribute of a trial: the resolved `model.precision`
KEPT = (RECORD_FILE, RUN_CONFIG_FILE, LOG_FILE, "curves.png")  # of every trial; the best one keeps more


class TrialFailed(Exception):  # noqa: N818
    """A trial that did not finish training; the sweep continues."""


class PruningCallback(TrainerCallback):
    """Reports the development score of each evaluation to the pruner, which may stop the run.

    Evaluations are numbered from 1, so that trials with other batch sizes or lengths can be compared.
    """

    def __init__(self, trial: Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.evaluations = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        if self.metric not in metrics:
            return  # another split
        self.evaluations += 1
        self.trial.report(metrics[self.metric], self.evaluations)
        # After the last evaluation the run ends anyway, and counts as complete.
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned


def run_trial(trial: Trial, config: RunConfig, task: Task, rows: Mapping[str, Dataset]) -> float:
    """Trains, and returns the task's main metric on its first evaluation split.

    Raises:
        TrialPruned: the pruner stopped the run.
        TrialFailed: training failed or ran out of GPU memory.
        UserError: an error in the config or the data that affects every trial.
    """
    split = task.evaluation_splits[0]
    callback = PruningCallback(trial, f"eval_{split}_{task.best_metric}")
    try:
        record = train(config, rows=rows, callbacks=[callback]).record
        value, failure = record.metrics[split][task.best_metric], ""
        trial.set_user_attr(PRECISION, record.config["model"]["precision"])
        if not math.isfinite(value):
            failure = f"{split} {task.best_metric} is {value}"
    except (TrainingError, torch.OutOfMemoryError) as error:
        value, failure = math.nan, str(error).partition("\n")[0]
    if failure:  # outside of the except block, whose exception keeps the model alive through its traceback
        trial.set_user_attr(ERROR, failure)
        raise TrialFailed(failure)
    return value


def free_memory() -> None:
    """Frees the model of the previous trial, which is part of reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trial_folder(number: int) -> str:
    return f"trial-{number}"


def best_trial(trials: Sequence[FrozenTrial], maximize: bool) -> FrozenTrial | None:
    """The complete trial with the best value, the first of equal ones."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(complete, key=lambda trial: ((trial.value or 0) * (-1 if maximize else 1), trial.number), default=None)


def remove_files(folder: Path, trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> None:
    """Removes the checkpoints of all finished trials, and the weights and predictions of all but the best.

    Several processes may do this at once: a finished trial that is not the best now never becomes the best.
    """
    for trial in trials:
        run = folder / trial_folder(trial.number)
        if not trial.state.is_finished() or not run.is_dir():
            continue
        is_best = best is not None and trial.number == best.number
        for entry in run.iterdir():
            if entry.name == "checkpoints" or not (is_best or entry.name in KEPT):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
