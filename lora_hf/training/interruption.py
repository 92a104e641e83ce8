"""Ctrl-C and SIGTERM: the step is finished and a checkpoint saved before the run ends."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from lora_hf.core.errors import Interrupted
from lora_hf.training.checkpoints import how_to_go_on
from lora_hf.training.distributed import largest, planned

logger = logging.getLogger(__name__)


class Interruption(TrainerCallback):
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

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.before = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Once another process is gone torchrun sends SIGTERM to this one, which has yet to say what happened.
        others_gone = planned() > 1 and isinstance(error, RuntimeError)
        for kind, handler in self.before.items():
            ignored = others_gone and kind == signal.SIGTERM
            signal.signal(kind, signal.SIG_IGN if ignored else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if self.heard is not None:
            raise Interrupted(kind, how_to_go_on(self.folder))
        self.heard = kind
        logger.warning("%s: finishing this step and saving; once more stops at once", kind.name)

    def _agree(self) -> None:
        number = largest(self.heard or 0)
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
            raise Interrupted(self.signal, how_to_go_on(self.folder))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        if self.signal is not None:
            raise Interrupted(self.signal, how_to_go_on(self.folder))
