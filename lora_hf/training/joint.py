"""Trains several adapters on one frozen base in shared batches; each learns as it would alone.

Each run has a Trainer of its own for its batches, optimizer, schedule, callbacks and evaluations, but the loop is here.
The next batches of all runs go through the base together, each row with the adapter of its run, in one forward and one
backward pass. Then each run takes a step with its own gradients.

Without dropout the weights equal those of the run alone up to rounding. With dropout the masks differ.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback
from transformers.trainer_utils import speed_metrics

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import UserError
from lora_hf.data.tasks.registry import task_of
from lora_hf.lora.inject import set_adapter
from lora_hf.lora.multi_adapter import move_adapter, unload_adapter
from lora_hf.lora.precision import flush_denormals
from lora_hf.training.callbacks import EvaluationLines
from lora_hf.training.checkpoints import translate_disk_full
from lora_hf.training.joint_batch import RunBatch, add_gradients
from lora_hf.training.run import PreparedRun, Run, find_run, finish_run, prepare_model, prepare_run
from lora_hf.training.run_dir import begin_run, run_lock, run_state
from lora_hf.training.validation import check_together

logger = logging.getLogger(__name__)


@flush_denormals()
def train_together(
    configs: Sequence[RunConfig],
    rows: Mapping[str, Mapping[str, Dataset]] | None = None,
    callbacks: Sequence[Sequence[TrainerCallback]] | None = None,
    catch: tuple[type[Exception], ...] = (),
) -> list[Run | Exception]:
    """Trains an adapter for each config, all on one copy of their base and in shared batches.

    The configs may differ in task, seed, `lora` and `train`. All runs step together; one with fewer steps ends earlier.
    The run folders are those that separate calls of `train` would write, but without checkpoints.

    Args:
        rows: splits that have been read already, by the name of the task.
        callbacks: for the Trainer of each run; None: a line on standard error for each evaluation. In `on_evaluate` one
            may end its run: with its results, by `control.should_training_stop`, or without, by raising an error.
        catch: errors that end one run and not all, beside UserError.

    Returns:
        For each config its run, or the error that ended it while the others continued.

    Raises:
        ConfigError: configs that cannot share a base.
        UserError: `train` cannot start one of them; nothing has been trained then.
    """
    check_together(configs)
    with ExitStack() as locks:
        members = waiting = _prepare(configs, rows or {}, callbacks, (UserError, *catch), locks)
        logger.info("%d runs train together", len(members))
        while waiting := [member for member in waiting if member.proceed()]:
            losses = add_gradients(waiting[0].run.model, [member.batch for member in waiting])
            for member, loss in zip(waiting, losses, strict=True):
                member.run.trainer.loss_monitor.add(loss, member.run.trainer.state.global_step)
    return [member.outcome for member in members if member.outcome is not None]


class _Member:
    """One of the runs. Its adapter is the last one that was added to the model; all others are frozen meanwhile."""

    def __init__(self, run: PreparedRun, catch: tuple[type[Exception], ...]) -> None:
        self.run, self.catch = run, catch
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.best: list[torch.Tensor] | None = None  # the parameters at the best evaluation
        self.batch: RunBatch  # whose gradients it waits for
        self.outcome: Run | Exception | None = None
        run.trainer.create_optimizer()
        self._steps = self._train()

    def proceed(self) -> bool:
        """Takes the step whose gradients are there, and fetches the next batch; False at the end of the run."""
        set_adapter(self.run.model, self.run.adapter)
        try:
            with translate_disk_full(self.run.folder):
                self.batch = next(self._steps)
            return True
        except StopIteration as end:
            self.outcome = end.value
        except self.catch as error:
            logger.warning("%s stopped: %s", self.run.folder.name, error)
            self.outcome = error
        unload_adapter(self.run.model, self.run.adapter)
        return False

    def _train(self) -> Iterator[RunBatch]:
        """The Trainer's loop; between two batches the gradients of the first are added to those of the parameters."""
        trainer: Any = self.run.trainer
        args, state, control, handler = trainer.args, trainer.state, trainer.control, trainer.callback_handler
        loader = trainer.get_train_dataloader()
        epochs, _, _, samples, _, length, max_steps = trainer.set_initial_training_values(args, loader)
        state.compute_steps(args, max_steps)
        state.init_training_references(trainer, max_steps, epochs, None)
        _, optimizer = trainer.accelerator.prepare(self.run.model, trainer.optimizer)
        trainer.optimizer, schedule = optimizer, trainer.create_scheduler(max_steps, optimizer)
        handler.train_dataloader, handler.optimizer, handler.lr_scheduler = loader, optimizer, schedule
        training, clock = time.time(), time.monotonic()
        max_norm, norm, rate = args.max_grad_norm or math.inf, 0.0, args.learning_rate
        handler.on_train_begin(args, state, control)
        if args.eval_on_start:
            trainer.evaluate()
        for epoch in range(epochs):
            handler.on_epoch_begin(args, state, control)
            loader.set_epoch(epoch)
            batches, done = iter(loader), 0
            while done < length and not (control.should_epoch_stop or control.should_training_stop):
                wanted = min(args.gradient_accumulation_steps, length - done)
                accumulated, items = trainer.get_batch_samples(batches, wanted, args.device)
                handler.on_step_begin(args, state, control)
                for inputs in accumulated:
                    yield RunBatch(self.run.adapter, self.run.task, inputs, items, len(accumulated))
                done += len(accumulated)
                norm = clip_grad_norm_(self.parameters, max_norm).item()
                handler.on_pre_optimizer_step(args, state, control)
                optimizer.step()
                handler.on_optimizer_step(args, state, control)
                rate = schedule.get_last_lr()[0]
                schedule.step()
                optimizer.zero_grad()
                state.global_step += 1
                state.epoch = epoch + done / length
                handler.on_step_end(args, state, control)
                self._log_and_evaluate(norm, rate)
            handler.on_epoch_end(args, state, control)
            self._log_and_evaluate(norm, rate)
            if control.should_training_stop:
                break
        share = state.global_step / max_steps  # less than 1 after an early stop
        metrics = speed_metrics("train", training, samples * share, state.global_step)
        trainer.log(metrics)
        if self.best is not None:
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.data.copy_(best)
        handler.on_train_end(args, state, control)
        return finish_run(self.run, metrics, clock)

    def _log_and_evaluate(self, norm: float, rate: float) -> None:
        trainer = self.run.trainer
        args, state = trainer.args, trainer.state
        if trainer.control.should_log and state.global_step > trainer.loss_monitor.logged_step:
            trainer.log({"loss": 0.0, "grad_norm": norm, "learning_rate": rate})  # with the loss of the monitor
        if not trainer.control.should_evaluate:
            return
        value = trainer.evaluate()[f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"]
        sign = 1 if args.greater_is_better else -1
        if sign * value > (-math.inf if state.best_metric is None else sign * state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step
            if args.load_best_model_at_end:
                self.best = [parameter.detach().clone() for parameter in self.parameters]


def _prepare(
    configs: Sequence[RunConfig],
    rows: Mapping[str, Mapping[str, Dataset]],
    callbacks: Sequence[Sequence[TrainerCallback]] | None,
    catch: tuple[type[Exception], ...],
    locks: ExitStack,
) -> list[_Member]:
    """Loads each run as `train` would, and moves its adapter onto the base of the first."""
    started, base, members = (datetime.now(timezone.utc), time.monotonic()), None, list[_Member]()
    for number, config in enumerate(configs):
        config, folder, _ = find_run(config)
        begin = partial(begin_run, config, folder, None, locks.enter_context(run_lock(folder)), run_state(folder))
        name, task = f"run{number:03d}", task_of(config.task)
        with translate_disk_full(folder):
            model, sites = prepare_model(config, task)
            base = move_adapter(model, model if base is None else base, name)
            del model
            gc.collect()  # a model is part of reference cycles
            splits = rows.get(task.name) or task.load(config.task.data_dir, task.splits)
            own = callbacks[number] if callbacks else [EvaluationLines(config.model.precision, f"{folder.name}, ")]
            run = prepare_run(config, folder, splits, base, sites, started, begin, own)
        run.adapter, run.record.together = name, len(configs)
        members.append(_Member(run, catch))
    for member in members:
        for parameter in member.parameters:
            parameter.requires_grad_(True)
    return members
