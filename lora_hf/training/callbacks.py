"""Callbacks of a run: progress, the log file, checkpoints, signals, and a guard against training nothing."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_hf.core.errors import Interrupted, TrainingError
from lora_hf.core.progress import ProgressTimer
from lora_hf.lora.inject import lora_layers
from lora_hf.training.checkpoints import (
    resume_hint,
    rotate_checkpoints,
    write_manifest,
    write_progress,
)
from lora_hf.training.distributed import all_reduce_max, barrier, world_size

if TYPE_CHECKING:
    from lora_hf.data.overview import DataOverview
    from lora_hf.lora.inject import ParameterCounts
    from lora_hf.training.estimate import Estimator
    from lora_hf.training.trainer import RunTrainer

logger = logging.getLogger(__name__)


def install_callbacks(trainer: Trainer, log_prefix: str, *callbacks: TrainerCallback) -> None:
    """Adds callbacks, and replaces the Trainer's own printing, because standard output is for results.

    Args:
        log_prefix: starts each line of progress, to name the run if there are several.
    """
    trainer.remove_callback(PrinterCallback)
    shows_bars = trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(ProgressBars() if shows_bars else ProgressLines(log_prefix))
    for callback in callbacks:
        trainer.add_callback(callback)


class ProgressBars(ProgressCallback):
    """The Trainer's progress bars, without its habit of printing every log to standard output."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        pass


class ProgressLines(TrainerCallback):
    """Prints a line of progress now and then, if standard error is not a terminal."""

    def __init__(self, log_prefix: str = "") -> None:
        self.log_prefix = log_prefix
        self.timer = ProgressTimer()
        self.first_step = self.evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer = ProgressTimer()
        self.first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None or not state.is_world_process_zero or not self.timer.is_due():
            return
        left = self.timer.time_left(state.global_step - self.first_step, state.max_steps - state.global_step)
        steps = f"{state.global_step:,} of {state.max_steps:,} steps"
        tqdm.write(f"{self.log_prefix}{steps}: loss {loss:.4f}, {left}", file=sys.stderr)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated += 1
        if state.is_world_process_zero and self.timer.is_due():
            batches = f"{self.evaluated:,} of {len(kwargs['eval_dataloader']):,} batches"
            tqdm.write(f"{self.log_prefix}evaluating: {batches}", file=sys.stderr)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated = 0

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.evaluated = 0


class RunLines(TrainerCallback):
    """Prints the data, the trained parameters, an estimate and each evaluation on standard error."""

    def __init__(
        self,
        precision: str,
        data: DataOverview,
        parameters: ParameterCounts,
        estimator: Estimator,
        log_prefix: str = "",
    ) -> None:
        self.precision, self.data, self.parameters, self.estimator = precision, data, parameters, estimator
        self.log_prefix = log_prefix
        self.estimated = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            trained = f"trains {self.parameters.trainable:,} of {self.parameters.total:,} parameters"
            steps = f"{state.max_steps:,} steps; {trained}; {self.precision} on {args.device.type}"
            for line in (*self.data.lines(), steps):
                tqdm.write(f"{self.log_prefix}{line}", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.estimator.estimate and not self.estimated and state.is_world_process_zero:
            self.estimated = True
            tqdm.write(f"{self.log_prefix}{self.estimator.estimate.line()}", file=sys.stderr)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        scores = {key.removeprefix("eval_"): value for key, value in (logs or {}).items() if key.startswith("eval_")}
        shown = [f"{key} {value:.4f}" for key, value in scores.items() if not key.endswith(("_runtime", "_per_second"))]
        if shown and state.is_world_process_zero:
            tqdm.write(f"{self.log_prefix}epoch {state.epoch:.2f}: " + "  ".join(shown), file=sys.stderr)


class LogFile(TrainerCallback):
    """Appends the Trainer's logs to `log.jsonl`, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **(logs or {})}) + "\n")


class TrainingGuard(TrainerCallback):
    """Stops a run that trains nothing: the optimizer is empty, or the first step leaves every lora_B unchanged."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.stepped = False
        self.checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if not any(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]):
            raise TrainingError("the optimizer has no parameters: nothing would be trained")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A warm-up starts at a learning rate of zero, whose step rightly changes nothing.
        self.stepped = any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.method != "lora" or self.checked or not self.stepped or kwargs["optimizer"].step_was_skipped:
            return
        self.checked = True
        layers = lora_layers(kwargs["model"])
        if not any(layer.adapters[layer.active].moved() for layer in layers.values() if layer.active):
            raise TrainingError(
                f"every lora_B is unchanged after step {state.global_step}: no gradient reaches the adapter, so the "
                "run would learn nothing. Is the adapter merged or disabled, or the loss detached from it?"
            )


class CheckpointCallback(TrainerCallback):
    """Completes each checkpoint, deletes old ones, and restores what the Trainer does not.

    Args:
        resumed_from: the checkpoint that the run resumes from.
        keep: how many checkpoints to keep besides the best; None keeps all.
        data: the digest of each split; those of a resumed run must be equal.
    """

    def __init__(
        self, trainer: RunTrainer, resumed_from: Path | None, keep: int | None, data: Mapping[str, str]
    ) -> None:
        self.trainer, self.resumed_from, self.keep, self.data = trainer, resumed_from, keep, data

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.training_began = True
        if self.resumed_from is not None:
            self.trainer.restore_progress(self.resumed_from)
            _follow_schedule(kwargs["lr_scheduler"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        monitor = self.trainer.loss_monitor
        loss: Any = self.trainer.accelerator.reduce(monitor.sum, "mean")
        barrier()  # every process has written its random state
        if args.should_save:
            folder = Path(str(args.output_dir))
            checkpoint = folder / f"checkpoint-{state.global_step}"
            progress = {
                "loss": float(loss),
                "logged": monitor.logged_step,
                "finished": control.should_training_stop,
                "skipped": self.trainer.loss_scaling.skipped,
                "processes": args.world_size,
                "data": self.data,
                "evaluation_due": self.trainer.evaluation_due,
            }
            write_progress(checkpoint, progress)
            write_manifest(checkpoint)
            rotate_checkpoints(folder, self.keep, state.best_global_step)
        barrier()


def _follow_schedule(scheduler: Any) -> None:
    """Sets the learning rate of a longer run, whose schedule differs from the one in the checkpoint.

    A scheduler that DeepSpeed or another library has wrapped does so at its next step.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    if [base * factor(scheduler.last_epoch) for base, factor in rates] != scheduler.get_last_lr():
        scheduler.last_epoch -= 1
        scheduler.step()


class EvaluationStoppedError(Exception):
    """Raised if a signal arrives during an evaluation."""


class SignalHandler(TrainerCallback):
    """Stops a run on Ctrl-C or SIGTERM. During training, it first finishes the step and saves a checkpoint.

    An evaluation can take long, so it stops after the current batch, and the resumed run repeats it. A signal may reach
    several processes in different steps, or only one of them. They therefore agree after each step, and all stop at the
    same one. A second signal stops at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.in_training = False
        self.received: signal.Signals | None = None  # by this process
        self.agreed: signal.Signals | None = None  # what all processes act on
        self.save_is_due = False
        self.previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.previous_handlers = {
                kind: signal.signal(kind, self._receive) for kind in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Once another process is gone torchrun sends SIGTERM to this one, which has yet to report the error.
        others_gone = world_size() > 1 and isinstance(error, RuntimeError)
        for kind, handler in self.previous_handlers.items():
            ignored = others_gone and kind == signal.SIGTERM
            signal.signal(kind, signal.SIG_IGN if ignored else handler)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside the `with` block, a signal takes effect only after all finished training is saved."""
        self.in_training = True
        try:
            yield
        finally:
            self.in_training = False
        self.stop_if_signaled()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        kind, before = signal.Signals(number), self.received
        self.received = before or kind
        if before is not None or not self.in_training:
            raise Interrupted(kind, resume_hint(self.folder))
        logger.warning("%s: finishing this step and saving a checkpoint; a second signal stops at once", kind.name)

    def _agree(self) -> None:
        number = all_reduce_max(self.received or 0)
        self.agreed = signal.Signals(number) if number else None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.in_training:
            self.stop_if_signaled()
        self._agree()
        if self.agreed is not None:
            raise EvaluationStoppedError

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        if state.epoch == int(state.epoch) or control.should_training_stop:
            self.save_is_due, control.should_save = control.should_save, False
        elif self.agreed is not None:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        control.should_save = control.should_save or self.save_is_due or self.agreed is not None
        self.save_is_due = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop_if_signaled()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop_if_signaled()

    def stop_if_signaled(self) -> None:
        self._agree()
        if self.agreed is not None:
            raise Interrupted(self.agreed, resume_hint(self.folder))
