"""The Hugging Face Trainer with adapter-only checkpoints, in one process or several."""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_hf.adapters.save_load import restore_adapter, save_adapter
from lora_hf.core.errors import TrainingError
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.sampling import EpochSampler, PromptSampler, last_batch_share
from lora_hf.lora.chunked_loss import enable_chunked_loss
from lora_hf.lora.inject import lora_layers
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.lora.variants.embedding import EmbeddingWeights
from lora_hf.training.checkpoints import (
    PARTIAL_DIR,
    PROGRESS,
    STATE,
    finalize_checkpoint,
    newest_valid,
    rotate_checkpoints,
)
from lora_hf.training.distributed import all_reduce_max, average_gradients, configure_fsdp, run_on_rank
from lora_hf.training.loss_scaling import Overflow
from lora_hf.training.optimizer import apply_loraplus

logger = logging.getLogger(__name__)

MAX_UNCHECKED_LOSSES = 16  # losses on a GPU that may wait for a look
SHARE = "share"  # of a batch: what its loss counts, where processes have unequally many rows


class RunTrainer(Trainer):
    """A Trainer that evaluates rows in the order they stand in, however the training rows are sampled.

    With `train_sampling_strategy=group_by_length` the Trainer shuffles the development rows too, and its predictions
    no longer belong to the rows of the file.
    """

    prompts: list[int] | None = None  # of the training rows: rows of one number come together
    loraplus_lr_ratio: float | None = None  # how many times faster LoRA's B learns
    adapter: str = "default"  # the name of the adapter that is trained
    shared: SharedModel | None = None  # where other runs train theirs on the same model
    aside: Path | None = None  # where a checkpoint is being written
    whole: Sequence[nn.Parameter] = ()  # under FSDP: what is trained, which each process holds whole

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.losses: list[tuple[int, torch.Tensor]] = []  # not yet checked: steps before, loss
        self.overflow = Overflow(self.model, self.accelerator)  # pyright: ignore[reportArgumentType]: there is a model
        self.add_callback(self.overflow)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if self.prompts is not None:
            return PromptSampler(self.prompts, self.args.seed)
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        sampler.batch_size *= self.args.world_size  # grouped as for one process with as many rows
        return EpochSampler(sampler, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        return SequentialSampler(eval_dataset)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.aside is None else str(self.aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes aside and renames: whatever stands under a checkpoint's name is whole."""
        folder, state = Path(str(self.args.output_dir)), self.state
        name, self.aside = f"checkpoint-{state.global_step}", folder / PARTIAL_DIR
        if self.args.should_save:
            shutil.rmtree(self.aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.aside = None
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder / name)
        loss: Any = self.accelerator.reduce(self._tr_loss, "mean")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = folder / PARTIAL_DIR / name
            state.save_to_json(str(written / STATE))
            progress = {
                "loss": float(loss),
                "logged": self._globalstep_last_logged,
                "finished": self.control.should_training_stop,
                "skipped": self.overflow.skipped,
                "processes": self.args.world_size,
            }
            (written / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            finalize_checkpoint(written, folder / name)
            shutil.rmtree(folder / PARTIAL_DIR, ignore_errors=True)  # else what lists checkpoints would find it
            best = state.best_model_checkpoint
            rotate_checkpoints(folder, self.args.save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def _init_training_state(self, *arguments: Any) -> Any:
        checkpoint = arguments[3]
        found = super()._init_training_state(*arguments)
        if checkpoint is not None and self.state.best_global_step:
            # The run may have been moved, or be gone on with from another folder.
            best = Path(checkpoint).with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return found

    def _run_epoch(self, **arguments: Any) -> None:
        """Goes on where the checkpoint was saved, in what is logged as well, and not beyond the end of the run."""
        checkpoint = arguments["resume_from_checkpoint"]
        if checkpoint is not None and arguments["epoch"] == arguments["epochs_trained"]:
            progress = json.loads((Path(checkpoint) / PROGRESS).read_text(encoding="utf-8"))
            self._tr_loss += progress["loss"]
            self._globalstep_last_logged = progress["logged"]
            self.overflow.skipped = progress["skipped"]
            if progress["finished"]:
                self.control.should_training_stop = True
                return
        super()._run_epoch(**arguments)

    def _prepare_for_training(self, *arguments: Any) -> Any:
        if self.is_fsdp_enabled:
            model: Any = self.model
            self.whole = configure_fsdp(model, self.accelerator.state.fsdp_plugin, self.accelerator.device)
        return super()._prepare_for_training(*arguments)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)

    def _without_repeats(self, batch: Any) -> Any:
        """The last batch of an epoch without the rows that fill it up, so that every row counts as in one process."""
        arguments, accelerator = self.args, self.accelerator
        plain = not accelerator.split_batches and arguments.train_sampling_strategy != "batch_rebalance"
        last = accelerator.gradient_state.end_of_dataloader and not arguments.dataloader_drop_last
        if arguments.world_size == 1 or not (plain and last):
            return batch
        rows: Any = self.train_dataset
        own, share = last_batch_share(
            len(rows), arguments.train_batch_size, arguments.world_size, arguments.process_index
        )
        if self.model_accepts_loss_kwargs:  # the loss is a sum over labels, divided by their number in all processes
            batch["labels"][own:] = IGNORE_INDEX
            return batch
        return {key: value[: max(own, 1)] for key, value in batch.items()} | {SHARE: share}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        share = inputs.pop(SHARE, 1.0)
        loss = super().compute_loss(model, inputs, *rest, **named)
        return loss if share == 1.0 else loss * share

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        self.losses.append((self.state.global_step, loss.detach()))
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.overflow.unscale(self.optimizer)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self.overflow.unscale(self.optimizer)
        return super()._get_grad_norm(model, grad_norm)

    def _maybe_log_save_evaluate(self, loss: torch.Tensor, norm: Any, *arguments: Any, **named: Any) -> None:
        due = self.control.should_log or self.control.should_evaluate or self.control.should_save
        # To look at a loss is to wait for the GPU; the CPU has it already.
        if due or self.args.device.type == "cpu" or len(self.losses) >= MAX_UNCHECKED_LOSSES:
            self._check_losses()
        if self.accelerator.optimizer_step_was_skipped:
            norm = None  # it is no number, which JSON has no word for
        super()._maybe_log_save_evaluate(loss, norm, *arguments, **named)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's loss counts rows twice that fill up the last batch of several processes; the scores do not."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.args.world_size > 1 and output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = self._loss_of(output.predictions, output.label_ids)
        return output

    def _loss_of(self, predictions: Any, label_ids: Any) -> float:
        """What one process finds that evaluates as many rows at once."""
        found, labels = torch.as_tensor(predictions).float(), torch.as_tensor(label_ids)
        if self.model_accepts_loss_kwargs:  # (rows, 2), see completion_loss: a mean over tokens for each batch
            batches = found.split(self.args.eval_batch_size * self.args.world_size)
            sums = [batch.sum(0) for batch in batches]
            means = [float(nll / tokens) * len(batch) for (nll, tokens), batch in zip(sums, batches, strict=True)]
            return sum(means) / len(found)
        if self.label_smoother is not None:
            return float(self.label_smoother({"logits": found}, labels))
        model: Any = self.model
        regression = getattr(model.config, "problem_type", None) == "regression"
        return float(mse_loss(found.reshape(-1), labels.float()) if regression else cross_entropy(found, labels))

    def _check_losses(self) -> None:
        """Raises TrainingError, in all processes, for the first batch since the last check whose loss is no number."""
        losses, self.losses = self.losses, []
        good = not losses or bool(torch.stack([loss for _, loss in losses]).isfinite().all())
        if not all_reduce_max(int(not good)):
            return
        first = len(losses) if good else next(n for n, (_, loss) in enumerate(losses) if not loss.isfinite())
        earliest = -all_reduce_max(-first)
        whose = all_reduce_max(self.args.process_index if first == earliest else -1)
        raise TrainingError(run_on_rank(lambda: self._no_number(losses, earliest), whose))

    def _no_number(self, losses: list[tuple[int, torch.Tensor]], first: int) -> str:
        """What to say of the loss at place `first`."""
        step, loss = losses[first]
        batch = sum(earlier == step for earlier, _ in losses[:first])
        rows = ", ".join(map(str, self._examples(step, batch)))
        good = newest_valid(Path(str(self.args.output_dir))) or "none"
        return (
            f"the loss is {loss.item()} at step {step + 1}: lower train.lr, or use model.precision=fp32. Its batch "
            f"holds the training examples {rows} (counting from 0); the last good checkpoint: {good}"
        )

    def _examples(self, step: int, batch: int) -> list[int]:
        """The rows of the encoded training set that were in a batch: the samplers give an epoch's order again."""
        loader: Any = self.callback_handler.train_dataloader
        accumulated = self.args.gradient_accumulation_steps
        epoch, done = divmod(step, math.ceil(len(loader) / accumulated))
        loader.set_epoch(epoch)
        return next(islice(loader.batch_sampler, done * accumulated + batch, None))


def enable_optimizations(model: PreTrainedModel, smoothing: float = 0.0) -> dict[str, Any]:
    """Makes the model skip padding and logits without a label; returns the TrainingArguments that go with it.

    Args:
        smoothing: of the labels.
    """
    scores_labels = enable_chunked_loss(model, smoothing)
    padded = enable_unpadding(model)
    if padded:
        logger.warning("batches stay padded, with rows of like length together: %s", padded)
    return {
        "label_smoothing_factor": 0.0 if scores_labels else smoothing,
        "train_sampling_strategy": "group_by_length" if padded else "random",
    }


class SharedModel(Protocol):
    """One model on which several runs train an adapter each (`joint`), as one of them sees it."""

    name: str  # of this run's adapter on the model
    runs: int
    threads: int  # that its batches are computed with

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """The shared model, which now has this run's adapter as well; `model` is no longer needed."""
        ...

    def step(self, trainer: Trainer, inputs: dict[str, Any], items: torch.Tensor | int | None) -> torch.Tensor:
        """The loss of a batch, its gradients left on this run's parameters; what `Trainer.training_step` does."""
        ...

    def compute(self, function: Callable[[], Any]) -> Any:
        """What the function returns, called where the shared model computes."""
        ...


class AdapterTrainer(RunTrainer):
    """A trainer whose checkpoints hold the adapter instead of the model, and which loads them back strictly."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.shared is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.whole and self.accelerator.sync_gradients:
                average_gradients(self.whole)
            return loss
        loss = self.shared.step(self, self._prepare_inputs(inputs), num_items_in_batch)
        self.losses.append((self.state.global_step, loss.detach()))
        return loss

    def prediction_step(self, *batch: Any, **named: Any) -> Any:
        if self.shared is None:
            return super().prediction_step(*batch, **named)
        return self.shared.compute(functools.partial(super().prediction_step, *batch, **named))

    @contextmanager
    def _without_fsdp(self) -> Iterator[None]:
        """The Trainer saves and loads inside as if the model were whole; what is trained is."""
        before, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = before

    def save_model(self, *arguments: Any, **named: Any) -> None:
        with self._without_fsdp():
            super().save_model(*arguments, **named)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._without_fsdp():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._without_fsdp():
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.loraplus_lr_ratio is not None:
            layers = lora_layers(self.model if model is None else model)  # type: ignore[arg-type]
            weights = [layer.adapters[layer.active] for layer in layers.values() if layer.active]
            # B of an embedding is random from the start; it is A that begins at zero there.
            factors = [place.lora_B for place in weights if not isinstance(place, EmbeddingWeights)]
            apply_loraplus(optimizer, factors, self.loraplus_lr_ratio)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        if self.args.should_save and folder:
            save_adapter(self.accelerator.unwrap_model(self.model), folder, self.adapter)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_adapter(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint, self.adapter)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            best = self.state.best_model_checkpoint
            restore_adapter(self.accelerator.unwrap_model(self.model), best, self.adapter)


def completion_loss(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """`(rows, 2)` from `(rows, length, vocabulary)`: the loss of each row's labelled tokens in nats, and their number.

    The logits of a whole development set would take gigabytes; these two numbers are all that a perplexity needs. A
    model that scores labels only (`language_head`) gives them itself.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if logits.ndim == 2:
        return logits
    logits = logits[:, :-1].float()
    targets = labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return torch.stack([losses.sum(1), (targets != IGNORE_INDEX).sum(1).float()], dim=1)


def cuda_peak() -> int:
    """The most memory that tensors held on the GPU, in bytes; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
