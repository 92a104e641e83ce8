"""The Hugging Face Trainer with adapter-only checkpoints, in one process or several.

It overrides only four private methods of the Trainer and calls three. `tests/project/test_private_members.py` lists
them with the reason, and fails with a clear message if a new version of transformers changes one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_hf.adapters.save_load import restore_adapter, save_adapter
from lora_hf.core.labels import IGNORE_INDEX
from lora_hf.data.sampling import EpochSampler, PromptSampler, last_batch_share
from lora_hf.lora.chunked_loss import enable_chunked_loss
from lora_hf.lora.host_batch import ON_HOST
from lora_hf.lora.shared_inputs import share_inputs
from lora_hf.lora.unpadding import enable_unpadding
from lora_hf.training.checkpoints import (
    PROGRESS_FILE,
    STATE_FILE,
    is_evaluation,
    read_progress,
    update_manifest,
    write_progress,
)
from lora_hf.training.classifier_loss import Loss, classifier_loss
from lora_hf.training.distributed import average_gradients
from lora_hf.training.loss_monitor import LossMonitor
from lora_hf.training.loss_scaling import LossScaling
from lora_hf.training.optimizer import apply_loraplus, loraplus_parameters

logger = logging.getLogger(__name__)

LOSS_SHARE = "loss_share"  # key of a batch: the weight of its loss, where processes hold unequal numbers of rows


class RunTrainer(Trainer):
    """A Trainer that evaluates rows in the order of the file, watches the loss and scales it for fp16 weights.

    Attributes:
        prompts: the number of the prompt of each training row. Rows with the same prompt share a batch.
        loraplus_lr_ratio: the learning rate of lora_B divided by that of lora_A (LoRA+).
        batch_sizes: the tokens of each batch, without and with padding, while `training.estimate` needs them.
        unsharded: the trained parameters under FSDP, which every process holds in full.
        classifier_loss: a function of logits and labels that replaces the model's loss.
    """

    prompts: list[int] | None = None
    loraplus_lr_ratio: float | None = None
    batch_sizes: list[tuple[int, int]] | None = None
    unsharded: Sequence[nn.Parameter] = ()
    classifier_loss: Loss | None = None
    training_began: bool = False
    reports_likelihoods: bool = False  # the outputs of an evaluation are those of `completion_loss` or `target_loss`
    evaluated: str = ""  # the prefix of the metrics of the current evaluation, which ends with the name of its split
    evaluation_due: bool = False  # the checkpoint being saved still needs its evaluation

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._started: dict[str, float] = {}  # when each duration that is logged began
        self._outputs: dict[int, dict[str, Any]] = {}  # by step and split: of the best evaluation and of the last
        model: Any = self.model
        self.loss_monitor = LossMonitor(self.args.device)
        self.loss_scaling = LossScaling(model, self.accelerator, self.args)
        self.add_callback(self.loss_scaling)
        self.add_callback(self.loss_monitor)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if self.prompts is not None:
            return PromptSampler(self.prompts, self.args.seed)
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        sampler.batch_size *= self.args.world_size  # grouped as for one process with as many rows
        return EpochSampler(sampler, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        # With train_sampling_strategy=group_by_length the Trainer also reorders the evaluation rows, so that its
        # predictions no longer belong to the rows of the file.
        return SequentialSampler(eval_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)

    def _without_repeats(self, batch: Any) -> Any:
        """Removes the rows that pad the last batch of an epoch, so that every row counts as in a single process."""
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
            batch.pop(ON_HOST, None)  # its labels are others now
            return batch
        batch.pop(ON_HOST, None)
        return {key: value[: max(own, 1)] for key, value in batch.items()} | {LOSS_SHARE: share}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        share = inputs.pop(LOSS_SHARE, 1.0)
        loss = self._loss(model, inputs, *rest, **named)
        return loss if share == 1.0 else loss * share

    def _loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **named: Any) -> Any:
        if self.classifier_loss is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **named)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.classifier_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
        if self.batch_sizes is not None:
            ids = inputs["input_ids"]
            mask = inputs.get("attention_mask")
            self.batch_sizes.append((ids.numel() if mask is None else int(mask.sum()), ids.numel()))
        loss = super().training_step(model, inputs, *rest, **named)
        self.loss_monitor.add(loss, self.state.global_step)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # The Trainer's own mean starts anew at a resume; this one goes on.
            logs["loss"] = self.loss_monitor.mean_since_last_log(self.state.global_step, self.accelerator)
            if self.accelerator.optimizer_step_was_skipped:
                logs.pop("grad_norm", None)  # inf or NaN, which JSON cannot hold
            elif self.loss_scaling.grad_norm is not None:
                logs["grad_norm"] = float(self.loss_scaling.grad_norm)
        for key in [key for key in logs if key.endswith("model_preparation_time")]:
            del logs[key]  # logged by an evaluation before training only
        self._correct_durations(logs)
        super().log(logs, start_time)

    def _correct_durations(self, logs: dict[str, float]) -> None:
        """Replaces the Trainer's durations, measured with a wall clock that may be set back, by monotonic ones."""
        for prefix in [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]:
            if prefix not in self._started:
                continue
            wall, logs[f"{prefix}_runtime"] = logs[f"{prefix}_runtime"], time.monotonic() - self._started[prefix]
            for rate in (f"{prefix}_samples_per_second", f"{prefix}_steps_per_second"):
                if rate in logs:
                    logs[rate] *= wall / logs[f"{prefix}_runtime"]

    def train(self, *arguments: Any, **named: Any) -> Any:
        self._started["train"] = time.monotonic()
        return super().train(*arguments, **named)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """With several processes, the Trainer's loss counts rows that pad the last batch twice; scores do not."""
        self._started[metric_key_prefix] = time.monotonic()
        self.evaluated = metric_key_prefix
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # Where each token has an output, the Trainer's loss is good enough: it chooses no checkpoint.
        if self.args.world_size > 1 and output.metrics and np.ndim(output.predictions) == 2:
            output.metrics[f"{metric_key_prefix}_loss"] = self._evaluation_loss(output.predictions, output.label_ids)
        best, now = self.state.best_global_step, self.state.global_step
        self._outputs = {step: outputs for step, outputs in self._outputs.items() if step in (best, now)}
        self._outputs.setdefault(now, {})[metric_key_prefix] = output.predictions
        return output

    def final_outputs(self, split: str, rows: Any) -> Any:
        """The outputs of the trained model for the rows of a split, taken from its evaluation if there was one."""
        uses_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        step = self.state.best_global_step if uses_best else self.state.global_step
        found = self._outputs.get(step or 0, {}).get(f"eval_{split}")
        return self.predict(rows, metric_key_prefix=split).predictions if found is None else found

    def _evaluation_loss(self, predictions: Any, label_ids: Any) -> float:
        """The loss that one process with the same total batch size would report."""
        outputs, labels = torch.as_tensor(predictions).float(), torch.as_tensor(label_ids)
        if self.reports_likelihoods:  # (rows, 2): a mean over tokens for each batch
            batches = outputs.split(self.args.eval_batch_size * self.args.world_size)
            sums = [batch.sum(0) for batch in batches]
            means = [float(nll / tokens) * len(batch) for (nll, tokens), batch in zip(sums, batches, strict=True)]
            return sum(means) / len(outputs)
        if self.classifier_loss is not None:
            return float(self.classifier_loss(outputs, labels))
        if self.label_smoother is not None:
            return float(self.label_smoother({"logits": outputs}, labels))
        model: Any = self.model
        return float(classifier_loss(outputs, labels, getattr(model.config, "problem_type", None)))

    def evaluate(self, eval_dataset: Any = None, *rest: Any, **named: Any) -> dict[str, float]:
        if eval_dataset is None:  # else one of several, called from here
            self._random_state = torch.get_rng_state()
        return super().evaluate(eval_dataset, *rest, **named)

    def save_unevaluated(self) -> None:
        """Saves a checkpoint from within an evaluation. `evaluate_checkpoint` repeats the evaluation."""
        torch.set_rng_state(self._random_state)  # each loader of evaluation rows draws a seed
        state = self.state
        state.log_history = [entry for entry in state.log_history if not is_evaluation(entry, state.global_step)]
        self.evaluation_due = True
        model: Any = self.model_wrapped
        self._save_checkpoint(model, trial=None)
        self.callback_handler.on_save(self.args, state, self.control)

    def evaluate_checkpoint(self, checkpoint: Path) -> None:
        """Runs the evaluation that a checkpoint still lacks, and stores the result there."""
        state = self.state = self._read_state(checkpoint)
        stateful = [each for each in self.callback_handler.callbacks if isinstance(each, ExportableState)]
        states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        for callback in stateful:  # how long patience has lasted
            vars(callback).update(states.get(type(callback).__name__, {}).get("attributes", {}))
        self._load_from_checkpoint(str(checkpoint))
        self._load_rng_state(str(checkpoint))
        metrics = self.evaluate()
        self._save_rng_state(str(checkpoint))
        value = metrics.get(str(self.args.metric_for_best_model))
        best, sign = state.best_metric, 1 if self.args.greater_is_better else -1
        if value is not None and (best is None or sign * value > sign * best):
            state.best_metric, state.best_global_step = value, state.global_step
            state.best_model_checkpoint = str(checkpoint)
        for callback in stateful:
            states[type(callback).__name__] = callback.state()
        progress = read_progress(checkpoint)
        progress |= {"evaluation_due": False, "finished": progress["finished"] or self.control.should_training_stop}
        self.accelerator.wait_for_everyone()  # every process has written its random state
        if self.args.should_save:
            state.save_to_json(str(checkpoint / STATE_FILE))
            write_progress(checkpoint, progress)
            random_states = [file.name for file in checkpoint.glob("rng_state*")]
            update_manifest(checkpoint, [STATE_FILE, PROGRESS_FILE, *random_states])
        self.accelerator.wait_for_everyone()

    def finish_from(self, checkpoint: Path) -> None:
        """Restores the state and the best weights of a run whose training is finished, without another step."""
        self.state = self._read_state(checkpoint)
        self.restore_progress(checkpoint)
        if self.state.best_model_checkpoint:
            self._load_best_model()
        self.log({"train_runtime": 0.0, "total_flos": self.state.total_flos})
        self.loss_scaling.on_train_end(self.args, self.state, self.control)

    def _read_state(self, checkpoint: Path) -> TrainerState:
        """Reads the state in a checkpoint, which process 0 wrote, and adapts it to this process."""
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        return state

    def restore_progress(self, checkpoint: Path) -> None:
        """Restores what the Trainer does not, after it has loaded the state of the checkpoint."""
        # The run folder may have been moved since.
        best = checkpoint.with_name(f"checkpoint-{self.state.best_global_step}")
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        progress = read_progress(checkpoint)
        self.loss_monitor.sum += progress["loss"]
        self.loss_monitor.logged_step = progress["logged"]
        self.loss_scaling.skipped = progress["skipped"]


class AdapterTrainer(RunTrainer):
    """A trainer whose checkpoints contain the adapter instead of the model. It loads them strictly."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.unsharded and self.accelerator.sync_gradients:
            average_gradients(self.unsharded)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.loraplus_lr_ratio is not None:
            parameters = loraplus_parameters(self.model if model is None else model)  # type: ignore[arg-type]
            apply_loraplus(optimizer, parameters, self.loraplus_lr_ratio)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        if self.args.should_save and folder:
            save_adapter(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_adapter(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if best := self.state.best_model_checkpoint:
            restore_adapter(self.accelerator.unwrap_model(self.model), best)


@dataclass(frozen=True)
class Optimizations:
    """What `enable_optimizations` did to a model.

    Attributes:
        scores_labels_only: the model computes logits and label smoothing only at labeled positions.
        padded_because: why batches stay padded; None if padding is skipped.
        shared_inputs: the number of groups of projections that run together because they share an input.
    """

    scores_labels_only: bool
    padded_because: str | None
    shared_inputs: int = 0

    def training_arguments(self, label_smoothing: float = 0.0) -> dict[str, Any]:
        """Returns the settings that the Trainer handles itself, as its arguments."""
        return {
            "label_smoothing_factor": 0.0 if self.scores_labels_only else label_smoothing,
            "train_sampling_strategy": "group_by_length" if self.padded_because else "random",
        }


def enable_optimizations(model: PreTrainedModel, label_smoothing: float = 0.0) -> Optimizations:
    """Skips padding and unlabeled logits, and computes q, k and v together, if the model type supports it."""
    scores_labels_only = enable_chunked_loss(model, label_smoothing)
    if not scores_labels_only:
        score_in_fp32(model)
    padded_because = enable_unpadding(model)
    if padded_because:
        logger.warning("batches stay padded, and rows of similar length are grouped: %s", padded_because)
    return Optimizations(scores_labels_only, padded_because, share_inputs(model))


def score_in_fp32(model: PreTrainedModel) -> None:
    """Makes a language model return fp32 logits; doing it again changes nothing.

    Most encoder-decoders, and the Trainer's label smoothing, sum the losses of all tokens in the precision of the
    logits: the mean has three digits in bf16, and is infinite in fp16.
    """
    head: Any = model.get_output_embeddings()
    if head is not None and _to_fp32 not in head._forward_hooks.values():
        head.register_forward_hook(_to_fp32)


def _to_fp32(head: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits.float()


def completion_loss(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Turns logits `(batch, seq, vocabulary)` into `(batch, 2)`: each row's total loss in nats and number of labels.

    The logits of a whole development set would take gigabytes, and these two numbers are enough for the perplexity. A
    model with chunked loss returns them itself.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if logits.ndim == 2:
        return logits
    logits = logits[:, :-1].float()
    targets = labels[:, 1:]
    return _row_losses(logits, targets)


def target_loss(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """`completion_loss` of an encoder-decoder, whose logits are those of the labels at the same positions."""
    return _row_losses((logits[0] if isinstance(logits, tuple) else logits).float(), labels)


def _row_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return torch.stack([losses.sum(1), (targets != IGNORE_INDEX).sum(1).float()], dim=1)


def stack_places(logits: tuple[torch.Tensor, ...], labels: Any) -> torch.Tensor:
    """`(batch, seq, 2)`: the start and end logits of a model that answers questions."""
    return torch.stack(logits[:2], dim=-1)
