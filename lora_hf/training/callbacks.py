"""What watches over a run: progress, lines and a log of what it finds, and a stop where it does not train."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_hf.core.errors import Interrupted, TrainingError
from lora_hf.core.formatting import minutes
from lora_hf.lora.inject import lora_layers
from lora_hf.training.checkpoints import resume_hint
from lora_hf.training.distributed import all_reduce_max, world_size

PAUSE = 30.0  # seconds between two lines of progress


def install_callbacks(trainer: Trainer, of: str, *callbacks: TrainerCallback) -> None:
    """Adds callbacks, and replaces the Trainer's own printing: standard output belongs to results.

    Args:
        of: the beginning of each line of progress, which names the run where there are several.
    """
    trainer.remove_callback(PrinterCallback)
    bars = trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(ProgressBars() if bars else ProgressLines(of))
    for callback in callbacks:
        trainer.add_callback(callback)


class ProgressBars(ProgressCallback):
    """The progress bars alone, without the Trainer's habit of printing every log to standard output."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        pass


class ProgressLines(TrainerCallback):
    """Where no bar is seen: a line on standard error that says how far the run is, PAUSE apart.

    In training at logs of its loss; between them, at an evaluation, how far that is.
    """

    def __init__(self, of: str = "") -> None:
        self.of = of
        self.began = self.said = 0.0
        self.first = self.evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.said = time.monotonic()
        self.first = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        now, loss = time.monotonic(), (logs or {}).get("loss")
        if loss is None or now - self.said < PAUSE or not state.is_world_process_zero:
            return
        self.said = now
        left = (now - self.began) / (state.global_step - self.first) * (state.max_steps - state.global_step)
        steps = f"{state.global_step:,} of {state.max_steps:,} steps"
        tqdm.write(f"{self.of}{steps}: loss {loss:.4f}, {minutes(left)} left", file=sys.stderr)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated += 1
        now = time.monotonic()
        if now - self.said >= PAUSE and state.is_world_process_zero:
            self.said = now
            batches = f"{self.evaluated:,} of {len(kwargs['eval_dataloader']):,} batches"
            tqdm.write(f"{self.of}evaluating, {batches}", file=sys.stderr)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated = 0

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.evaluated = 0


class EvaluationLines(TrainerCallback):
    """A line on standard error at the start and at each evaluation, above the progress bars where there are any."""

    def __init__(self, precision: str, of: str = "") -> None:
        self.precision, self.of = precision, of

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is ahead: between two evaluations minutes may pass."""
        if state.is_world_process_zero:
            rows = len(kwargs["train_dataloader"].dataset)
            ahead = f"{state.max_steps:,} steps; {rows:,} training rows; {self.precision} on {args.device.type}"
            tqdm.write(f"{self.of}{ahead}", file=sys.stderr)

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


class TrainingGuard(TrainerCallback):
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


logger = logging.getLogger(__name__)


class SignalHandler(TrainerCallback):
    """Saves and stops where a signal has come; a second one stops at once.

    Saving waits for what belongs to a step: the evaluation after an epoch's last one comes before its checkpoint, or a
    run that goes on from there would never make it. Several processes may hear of a signal in different steps, or only
    one of them does: they ask each other after every step, and all stop at the same one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heard: signal.Signals | None = None  # by this process
        self.signal: signal.Signals | None = None  # on which all of them act
        self.postponed = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.before = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Once another process is gone torchrun sends SIGTERM to this one, which has yet to say what happened.
        others_gone = world_size() > 1 and isinstance(error, RuntimeError)
        for kind, handler in self.before.items():
            ignored = others_gone and kind == signal.SIGTERM
            signal.signal(kind, signal.SIG_IGN if ignored else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if self.heard is not None:
            raise Interrupted(kind, resume_hint(self.folder))
        self.heard = kind
        logger.warning("%s: finishing this step and saving; once more stops at once", kind.name)

    def _agree(self) -> None:
        number = all_reduce_max(self.heard or 0)
        self.signal = signal.Signals(number) if number else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        if state.epoch == int(state.epoch) or control.should_training_stop:
            self.postponed, control.should_save = control.should_save, False
        elif self.signal is not None:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        control.should_save = control.should_save or self.postponed or self.signal is not None
        self.postponed = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        if self.signal is not None:
            raise Interrupted(self.signal, resume_hint(self.folder))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        if self.signal is not None:
            raise Interrupted(self.signal, resume_hint(self.folder))
