"""One trial of a sweep: a training run that the pruner can stop."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from typing import Any

import optuna
import torch
from datasets import Dataset
from optuna.trial import Trial
from transformers import TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import TrainingError
from lora_hf.data.tasks.base import Task
from lora_hf.experiments.sweep.storage import ERROR, PRECISION, TrialFailed
from lora_hf.training.run import train


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
    split, metric = task.evaluation_splits[0], task.best_metric
    try:
        record = train(config, rows=rows, callbacks=[PruningCallback(trial, f"eval_{split}_{metric}")]).record
        value = record.metrics[split][metric]
        trial.set_user_attr(PRECISION, record.config["model"]["precision"])
        failure = "" if math.isfinite(value) else f"{split} {metric} is {value}"
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
