"""Trains several adapters on one frozen base in shared batches; each learns as it would alone.

Each run is the ordinary `train` in a thread of its own. One thread moves at a time, always in the same order, with its
own random state. A run that has its next batch waits. Once all of them wait, their rows go through the model together,
every row under its own adapter; then each run continues with its own gradients, optimizer, schedule, evaluations and
checkpoints.

Without dropout the weights equal those of the run alone up to rounding. With dropout the masks differ.
"""

from __future__ import annotations

import logging
import random
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, pad
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, Trainer

from lora_hf.adapters.save_load import load_adapter, save_adapter
from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import TrainingError, UserError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.registry import task_of
from lora_hf.lora.inject import eject, set_adapter
from lora_hf.lora.multi_adapter import mix_adapters
from lora_hf.lora.precision import flush_denormals
from lora_hf.models.align import padding_side
from lora_hf.training.run import Run, train
from lora_hf.training.validation import check_together

logger = logging.getLogger(__name__)

PADDING_VALUES = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORE_INDEX}


@flush_denormals()
def train_together(
    configs: Sequence[RunConfig], resume: str | None = None, rows: Mapping[str, Mapping[str, Dataset]] | None = None
) -> list[Run | UserError]:
    """Trains an adapter for each config, all on one copy of their base and in shared batches.

    The configs may differ in task, seed, `lora` and `train`. All runs step together; one with fewer steps ends earlier.
    The run folders are those that separate calls of `train` would write.

    Args:
        resume: `auto`, as in `train`; a checkpoint belongs to one run.
        rows: splits that have been read already, by the name of the task.

    Returns:
        For each config its run, or the error that stopped it while the others continued.

    Raises:
        ConfigError: configs that cannot share a base.
        UserError: `train` cannot start one of them; nothing has been trained then.
    """
    check_together(configs, resume)
    return _Together(configs, resume, rows or {}).run()


class _Member(threading.Thread):
    """The thread of one run. It moves only during `proceed`, and waits where it needs the gradients of a batch."""

    def __init__(self, number: int, config: RunConfig, host: _Together) -> None:
        super().__init__(name=f"run{number:03d}", daemon=True)
        self.config, self.host = config, host
        self.runs, self.threads = len(host.configs), torch.get_num_threads()
        self.task: Task = task_of(config.task)
        self.own: list[nn.Parameter] = []
        self.gradients: list[torch.Tensor | None] = []
        self.inputs: dict[str, torch.Tensor] | None = None  # the batch that it waits with
        self.items: torch.Tensor | int | None = None  # the number of tokens that a language model's loss is divided by
        self.divisor = 1
        self.loss = torch.tensor(0.0)
        self.work: Callable[[], Any] | None = None  # what the host is to compute for it; the result is in `done`
        self.done: Any = None
        self.outcome: Run | BaseException | None = None
        self.cancelled = False
        self._may_move, self._stands = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._may_move.acquire()
        # Each thread would start an OpenMP pool of its own. With more workers than cores they all sleep between two
        # operations, so the host's pool computes what is large. The setting is per thread, but MKL's is global.
        torch.set_num_threads(1)
        try:
            if not self.cancelled:
                rows = self.host.rows.get(self.task.name)
                self.outcome = train(self.config, self.host.resume, rows, shared=self)
        except BaseException as error:  # noqa: BLE001 - the other thread handles it
            self.outcome = error
        self.inputs = None
        self._stands.release()

    def proceed(self) -> None:
        """Lets the run move to its next batch, or to its end; the gradients of the last batch are on its parameters."""
        self.inputs = None
        self._may_move.release()
        self._stands.acquire()
        torch.set_num_threads(self.threads)
        while self.work is not None:
            try:
                self.done = self.work()
            except Exception as error:  # noqa: BLE001 - the other thread handles it
                self.done = error
            self.work = None
            self._may_move.release()
            self._stands.acquire()

    def compute(self, function: Callable[[], Any]) -> Any:
        self.work = function
        self._stands.release()
        self._may_move.acquire()
        if self.cancelled:
            raise SystemExit
        if isinstance(self.done, Exception):
            raise self.done
        return self.done

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        return self.host.attach(self, model)

    def step(self, trainer: Trainer, inputs: dict[str, Any], items: torch.Tensor | int | None) -> torch.Tensor:
        self.inputs, self.items = inputs, items
        self.divisor = trainer.current_gradient_accumulation_steps
        drawn = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the state that the Trainer saves
        # Accelerate has one state for all Trainers of a process; its optimizers step only where this is set.
        accumulation = trainer.accelerator.gradient_state
        sync_gradients = accumulation.sync_gradients
        self._stands.release()
        self._may_move.acquire()
        if self.cancelled:
            raise SystemExit
        torch.set_rng_state(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        random.setstate(drawn[2])
        accumulation.sync_gradients = sync_gradients
        return self.loss


class _Together:
    """The shared model, and the order in which the runs move."""

    def __init__(
        self, configs: Sequence[RunConfig], resume: str | None, rows: Mapping[str, Mapping[str, Dataset]]
    ) -> None:
        self.configs, self.resume, self.rows = configs, resume, rows
        self.model: Any = None
        self.members = [_Member(number, config, self) for number, config in enumerate(configs)]

    def run(self) -> list[Run | UserError]:
        try:
            for member in self.members:
                member.start()
                self._proceed(member)
                if isinstance(member.outcome, UserError):
                    raise member.outcome
            logger.info("%d runs train together", len(self.members))
            while waiting := [member for member in self.members if member.inputs is not None]:
                self._step(waiting)
                for member in waiting:
                    self._proceed(member)
                    if isinstance(member.outcome, UserError):
                        logger.warning("%s stopped: %s", member.config.output.name, member.outcome)
            return [member.outcome for member in self.members if isinstance(member.outcome, (Run, UserError))]
        finally:
            self._cancel()

    def attach(self, member: _Member, model: PreTrainedModel) -> PreTrainedModel:
        """Moves the adapter of `model` onto the shared model, under the member's name."""
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, folder)
            if self.model is None:
                self.model = eject(model)
            load_adapter(self.model, folder, member.name, own_head=True)
        member.own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return self.model

    def _proceed(self, member: _Member) -> None:
        """Gives the model to one run while it moves."""
        if member.own:
            set_adapter(self.model, member.name)
            self._train_only([member])
            _put(member.own, member.gradients)
        member.proceed()
        if member.own:
            member.gradients = [parameter.grad for parameter in member.own]
            _put(member.own, [None] * len(member.own))
        if isinstance(member.outcome, BaseException) and not isinstance(member.outcome, UserError):
            raise member.outcome

    def _step(self, waiting: Sequence[_Member]) -> None:
        """One forward and backward pass over the rows of all waiting runs."""
        self._train_only(waiting)
        self.model.train()
        batches = [member.inputs or {} for member in waiting]
        counts = [len(batch["input_ids"]) for batch in batches]
        names = [member.name for member, count in zip(waiting, counts, strict=True) for _ in range(count)]
        every = [parameter for member in waiting for parameter in member.own]
        for masked in (True, False):
            with mix_adapters(self.model, names, masked=masked):
                total, losses = self._losses(waiting, batches, counts)
            total.backward()
            if get_total_norm(parameter.grad for parameter in every if parameter.grad is not None).isfinite():
                break
            # One run diverged. Repeat without shared products, so that its infinities stay its own.
            if masked:
                _put(every, [None] * len(every))
        for member, loss in zip(waiting, losses, strict=True):
            member.loss = loss.detach()
            new = [parameter.grad for parameter in member.own]
            # With gradient accumulation the gradients of earlier batches are still there.
            pairs = zip(member.gradients, new, strict=True)
            member.gradients = [old if grad is None else grad if old is None else old + grad for old, grad in pairs]
            _put(member.own, [None] * len(member.own))

    def _losses(
        self, waiting: Sequence[_Member], batches: Sequence[dict[str, torch.Tensor]], counts: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The sum of the losses, to differentiate, and the loss that each run logs."""
        generates = waiting[0].task.model_kind == "causal-lm"
        keys = [key for key in batches[0] if generates or key != "labels"]
        left = padding_side(self.model) == "left"
        inputs = {key: _stacked([batch[key] for batch in batches], self._padding_value(key), left) for key in keys}
        if generates:
            return self._token_losses(waiting, inputs, counts)
        losses = []
        for member, batch, logits in zip(waiting, batches, self.model(**inputs).logits.split(counts), strict=True):
            logits = logits[:, : member.task.num_labels]
            regression = member.task.problem_type == "regression"
            loss = mse_loss(logits[:, 0], batch["labels"]) if regression else cross_entropy(logits, batch["labels"])
            losses.append(loss / member.divisor)
        return torch.stack(losses).sum(), losses

    def _token_losses(
        self, waiting: Sequence[_Member], inputs: dict[str, torch.Tensor], counts: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        items = torch.stack([torch.as_tensor(member.items).float() for member in waiting])
        by_row = torch.cat([item.expand(count) for item, count in zip(items, counts, strict=True)])
        output = self.model(**inputs, num_items_in_batch=by_row)
        if "rows" not in output:
            raise TrainingError(f"{self.model.config.model_type} has no loss by row; train these runs one by one")
        shares = [rows[:, 0].sum() for rows in output.rows.split(counts)]
        return output.loss, [share / item for share, item in zip(shares, items, strict=True)]

    def _padding_value(self, key: str) -> int:
        return self.model.config.pad_token_id if key == "input_ids" else PADDING_VALUES.get(key, 0)

    def _train_only(self, members: Sequence[_Member]) -> None:
        chosen = {id(parameter) for member in members for parameter in member.own}
        for member in self.members:
            for parameter in member.own:
                parameter.requires_grad_(id(parameter) in chosen)

    def _cancel(self) -> None:
        for member in self.members:
            member.cancelled = True
            if member.is_alive():
                member.proceed()
                member.join()


def _put(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _stacked(parts: Sequence[torch.Tensor], padding_value: int, left: bool) -> torch.Tensor:
    """`(rows, seq)`: the rows of all parts, padded to the longest."""
    missing = [max(part.shape[1] for part in parts) - part.shape[1] for part in parts]
    sides = [(count, 0) if left else (0, count) for count in missing]
    return torch.cat([pad(part, side, value=padding_value) for part, side in zip(parts, sides, strict=True)])
