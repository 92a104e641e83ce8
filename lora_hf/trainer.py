"""The Hugging Face Trainer with adapter-only checkpoints, and the callbacks that watch over a run."""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_hf.adapters import restore_adapter, save_adapter
from lora_hf.checkpoints import ASIDE, STATE, newest_whole, prune, publish
from lora_hf.errors import TrainingError
from lora_hf.injection import lora_layers
from lora_hf.language_head import IGNORED, score_labels_only
from lora_hf.overflow import Overflow
from lora_hf.padding_free import remove_padding
from lora_hf.variants.embedding import EmbeddingWeights
from lora_hf.variants.loraplus import quicken

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"  # what the Trainer does not keep in a checkpoint
UNCHECKED = 16  # losses on a GPU that may wait for a look


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

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.losses: list[tuple[int, torch.Tensor]] = []  # not yet checked: steps before, loss
        self.overflow = Overflow(self.model, self.accelerator)  # pyright: ignore[reportArgumentType]: there is a model
        self.add_callback(self.overflow)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if self.prompts is not None:
            return PromptSampler(self.prompts, self.args.seed)
        sampler = super()._get_train_sampler(train_dataset)
        return EpochSampler(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.aside is None else str(self.aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes aside and renames: whatever stands under a checkpoint's name is whole."""
        folder, state = Path(str(self.args.output_dir)), self.state
        name, self.aside = f"checkpoint-{state.global_step}", folder / ASIDE
        if self.args.should_save:
            shutil.rmtree(self.aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.aside = None
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = folder / ASIDE / name
            state.save_to_json(str(written / STATE))
            progress = {
                "loss": float(self._tr_loss),
                "logged": self._globalstep_last_logged,
                "finished": self.control.should_training_stop,
                "skipped": self.overflow.skipped,
            }
            (written / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            publish(written, folder / name)
            shutil.rmtree(folder / ASIDE, ignore_errors=True)  # else what lists checkpoints would find it
            best = state.best_model_checkpoint
            prune(folder, self.args.save_total_limit, Path(best) if best else None)
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
        if due or self.args.device.type == "cpu" or len(self.losses) >= UNCHECKED:
            self._check_losses()
        if self.accelerator.optimizer_step_was_skipped:
            norm = None  # it is no number, which JSON has no word for
        super()._maybe_log_save_evaluate(loss, norm, *arguments, **named)

    def _check_losses(self) -> None:
        """Raises TrainingError for the first batch since the last check whose loss is no number."""
        losses, self.losses = self.losses, []
        if not losses or bool(torch.stack([loss for _, loss in losses]).isfinite().all()):
            return
        first = next(place for place, (_, loss) in enumerate(losses) if not loss.isfinite())
        step, loss = losses[first]
        batch = sum(earlier == step for earlier, _ in losses[:first])
        rows = ", ".join(map(str, self._examples(step, batch)))
        good = newest_whole(Path(str(self.args.output_dir))) or "none"
        raise TrainingError(
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


class EpochSampler(torch.utils.data.Sampler):
    """Another sampler of rows, with an order for each epoch that depends on the seed alone.

    The Trainer draws the order of `group_by_length` from the generator of everything else: a run that goes on in the
    middle of an epoch would get another.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class PromptSampler(torch.utils.data.Sampler):
    """Rows in random order, those of one prompt together and among themselves in random order too.

    In a batch of such rows a causal model computes the prompt once (`kernels/prefixes.py`).
    """

    def __init__(self, prompts: list[int], seed: int) -> None:
        self.prompts = torch.tensor(prompts)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.prompts), generator=generator)
        places = torch.randperm(int(self.prompts.max()) + 1, generator=generator)[self.prompts[rows]]
        return iter(rows[places.argsort(stable=True)].tolist())


def number_prompts(labels: Iterable[Sequence[int]], input_ids: Iterable[Sequence[int]]) -> list[int]:
    """For each row the number of its prompt: the tokens in front of its first label."""
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    for row, ids in zip(labels, input_ids, strict=True):
        length = next((place for place, label in enumerate(row) if label != IGNORED), len(row))
        found.append(numbers.setdefault(tuple(ids[:length]), len(numbers)))
    return found


def spare_work(model: PreTrainedModel, smoothing: float = 0.0) -> dict[str, Any]:
    """Makes the model skip padding and logits without a label; returns the TrainingArguments that go with it.

    Args:
        smoothing: of the labels.
    """
    scores_labels = score_labels_only(model, smoothing)
    padded = remove_padding(model)
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

    def take_in(self, model: PreTrainedModel) -> PreTrainedModel:
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
            return super().training_step(model, inputs, num_items_in_batch)
        loss = self.shared.step(self, self._prepare_inputs(inputs), num_items_in_batch)
        self.losses.append((self.state.global_step, loss.detach()))
        return loss

    def prediction_step(self, *batch: Any, **named: Any) -> Any:
        if self.shared is None:
            return super().prediction_step(*batch, **named)
        return self.shared.compute(functools.partial(super().prediction_step, *batch, **named))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.loraplus_lr_ratio is not None:
            layers = lora_layers(self.model if model is None else model)  # type: ignore[arg-type]
            weights = [layer.adapters[layer.active] for layer in layers.values() if layer.active]
            # B of an embedding is random from the start; it is A that begins at zero there.
            factors = [place.lora_B for place in weights if not isinstance(place, EmbeddingWeights)]
            quicken(optimizer, factors, self.loraplus_lr_ratio)
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


def use_callbacks(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Adds callbacks, and replaces the Trainer's own printing: standard output belongs to results."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(QuietProgress())
    for callback in callbacks:
        trainer.add_callback(callback)


class QuietProgress(ProgressCallback):
    """The progress bars alone, without the Trainer's habit of printing every log to standard output."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        pass


class EvaluationLines(TrainerCallback):
    """A line on standard error for each evaluation, above the progress bars where there are any."""

    def __init__(self, of: str = "") -> None:
        self.of = of

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        scores = {key.removeprefix("eval_"): value for key, value in (logs or {}).items() if key.startswith("eval_")}
        shown = [f"{key} {value:.4f}" for key, value in scores.items() if not key.endswith(("_runtime", "_per_second"))]
        if shown and state.is_world_process_zero:
            tqdm.write(f"{self.of}epoch {state.epoch:.2f}: " + "  ".join(shown), file=sys.stderr)


class LogFile(TrainerCallback):
    """Appends what the Trainer logs to `log.jsonl`, a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops what a run wrote after the checkpoint from which it goes on now: it writes that again."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self.path.write_text(
            "".join(line for line in whole if json.loads(line)["step"] <= state.global_step), encoding="utf-8"
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **(logs or {})}) + "\n")


class Guard(TrainerCallback):
    """Stops a run that does not train: an empty optimiser, or LoRA B unmoved after a step."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.stepped = False
        self.checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if not any(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]):
            raise TrainingError("the optimiser got no parameters: nothing would be trained")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A warm-up begins at a learning rate of zero: that step moves nothing, and is no sign of a mistake.
        self.stepped = any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.method != "lora" or self.checked or not self.stepped or kwargs["optimizer"].step_was_skipped:
            return
        self.checked = True
        layers = lora_layers(kwargs["model"])
        if not any(layer.adapters[layer.active].moved() for layer in layers.values() if layer.active):
            raise TrainingError(
                f"every LoRA B is still what it started as after step {state.global_step}: no gradient reaches the "
                "adapter, so the run would change nothing. Is it merged or disabled, or the loss detached from it?"
            )


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
    return torch.stack([losses.sum(1), (targets != -100).sum(1).float()], dim=1)


def cuda_peak() -> int:
    """The most memory that tensors held on the GPU, in bytes; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
