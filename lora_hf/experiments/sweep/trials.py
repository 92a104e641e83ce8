"""One trial of a sweep: a training run that the pruner can stop."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import optuna
import torch
from datasets import Dataset
from optuna.trial import Trial
from transformers import TrainerCallback

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import DivergedError, TrainingError
from lora_hf.data.tasks.base import Task
from lora_hf.experiments.sweep.storage import ERROR, MEASURED, PRECISION, TrialFailed
from lora_hf.training.run import train


class PruningCallback(TrainerCallback):
    """Tells the pruner how the run goes, and lets it stop the run.

    The pruner sees the score of each evaluation on the first split. Evaluations are numbered from 1, so that trials
    with other batch sizes or lengths can be compared.

    With `rungs` it sees the training loss instead: trials with one seed learn from the same batches, the loss costs no
    evaluation, and it differs where all scores are still those of the majority class.

    Args:
        rungs: steps at which the losses of trials are compared, with the number of each for the pruner.
    """

    def __init__(self, trial: Trial, task: Task, rungs: Mapping[int, int]) -> None:
        self.trial, self.rungs = trial, rungs
        self.prefix, self.metric = f"eval_{task.evaluation_splits[0]}_", task.best_metric
        self.loss_sign = -1 if task.greater_is_better else 1  # the pruner's direction is that of the score
        self.steps = 0
        self.scores: list[float] = []
        self.losses: dict[int, float] = {}  # by step
        self.loss: float | None = None  # of the evaluation rows; with rungs, of training

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        if self.steps in self.rungs:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}) or not self.rungs:
            return
        self.losses[self.steps] = logs["loss"]  # type: ignore[index]
        if self.steps in self.rungs:
            # The first half of the steps until here says little: the rate was still warming up, or lower rungs saw it.
            self.loss = fmean(loss for step, loss in self.losses.items() if step > self.steps // 2)
            self._report(self.loss_sign * self.loss, self.rungs[self.steps], state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        if self.rungs or self.prefix + self.metric not in metrics:
            return  # another split
        self.scores.append(metrics[self.prefix + self.metric])
        self.loss = metrics[f"{self.prefix}loss"]
        self._report(self.scores[-1], len(self.scores), state)

    def _report(self, value: float, number: int, state: Any) -> None:
        self.trial.report(value, number)
        # At its end a run counts as complete.
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned


def run_trial(
    trial: Trial, config: RunConfig, task: Task, rows: Mapping[str, Dataset], rungs: Mapping[int, int]
) -> float:
    """Trains, and returns the task's main metric on its first evaluation split.

    Raises:
        TrialPruned: the pruner stopped the run.
        TrialFailed: training failed or ran out of GPU memory.
        UserError: an error in the config or the data that affects every trial.
    """
    split, metric = task.evaluation_splits[0], task.best_metric
    callback, cpu, diverged = PruningCallback(trial, task, rungs), time.process_time(), False
    try:
        record = train(config, rows=rows, callbacks=[callback]).record
        value = record.metrics[split][metric]
        trial.set_user_attr(PRECISION, record.config["model"]["precision"])
        failure = "" if math.isfinite(value) else f"{split} {metric} is {value}"
    except (TrainingError, torch.OutOfMemoryError) as error:
        value, failure = math.nan, str(error).partition("\n")[0]
        if isinstance(error, DivergedError):
            diverged, callback.steps = True, error.step
    finally:
        measured = {"evaluations": callback.scores, "loss": callback.loss, "steps": callback.steps}
        trial.set_user_attr(MEASURED, measured | {"cpu_seconds": time.process_time() - cpu, "diverged": diverged})
    if failure:  # outside of the except block, whose exception keeps the model alive through its traceback
        trial.set_user_attr(ERROR, failure)
        raise TrialFailed(failure)
    return value


def free_memory() -> None:
    """Frees the model of the previous trial, which is part of reference cycles."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
