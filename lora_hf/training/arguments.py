"""The Trainer's own configuration for a run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.base import Task
from lora_hf.training.checkpoints import KEPT_CHECKPOINTS
from lora_hf.training.distributed import world_size
from lora_hf.training.trainer import Optimizations
from lora_hf.training.validation import TRACKERS

# The largest share: the Trainer rounds up, so this means all steps.
BELOW_ONE = math.nextafter(1.0, 0.0)

# What transformers, accelerate and torch raise about a value they cannot use. Not any OSError: that may be a full disk.
ARGUMENT_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError),
    *(FileNotFoundError, RuntimeError, TypeError, ValueError),
)


@contextmanager
def explain_argument_errors(hf: Mapping[str, Any], began: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turns errors of transformers, accelerate or torch about the Trainer's arguments into ones that name `train.hf`.

    Args:
        began: returns whether training has begun; later errors have other causes.

    Raises:
        ConfigError: `train.hf` holds a value that cannot be used.
    """
    try:
        yield
    except Exception as error:
        from_tracker = type(error).__module__.partition(".")[0] in TRACKERS  # such as wandb's without an API key
        # Out of memory, or without another process, a RuntimeError has nothing to do with the arguments.
        if not hf or began() or isinstance(error, torch.OutOfMemoryError) or world_size() > 1:
            raise
        if not from_tracker and not isinstance(error, ARGUMENT_ERRORS):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"train.hf: {', '.join(f'{key}={value!r:.60}' for key, value in hf.items())}: {reason}"
        ) from error


class _OneDeviceArguments(TrainingArguments):
    """One GPU per process. The Trainer would copy the model to every GPU it sees and multiply the batch size."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def training_arguments(config: RunConfig, task: Task, folder: Path, optimizations: Optimizations) -> TrainingArguments:
    """Builds the Trainer's arguments from the config of a run.

    Raises:
        ConfigError: `train.hf` does not fit the rest of the config, or this machine.
    """
    train = config.train
    several_labels = task.problem_type == "multi_label_classification"  # `training.classifier_loss` smooths those
    autocast = config.model.precision if train.method == "full" else "fp32"
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.eval_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.lr,
        "weight_decay": train.weight_decay,
        # The Trainer reads a value below 1 as a share of all steps, and 1.0 as one step.
        "warmup_steps": min(train.warmup_ratio, BELOW_ONE) if train.warmup_steps is None else train.warmup_steps,
        "lr_scheduler_type": train.schedule,
        "max_grad_norm": train.max_grad_norm,
        **optimizations.training_arguments(0.0 if several_labels else train.label_smoothing),
        "seed": train.seed,
        "data_seed": train.seed,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": KEPT_CHECKPOINTS,
        "restore_callback_states_from_checkpoint": True,  # how long patience has lasted
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{task.evaluation_splits[0]}_{task.best_metric}",
        "greater_is_better": task.greater_is_better,
        "logging_strategy": "steps",
        "logging_steps": 0.02,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "run_name": folder.name,  # how trackers call the run
        "disable_tqdm": not sys.stderr.isatty(),
        # A copy of a batch to a GPU does not wait for the steps before it.
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},
        "ddp_find_unused_parameters": False,
        "bf16": autocast == "bf16",
        "fp16": autocast == "fp16",
        # Without a GPU the Trainer refuses bf16, and several processes, unless told that the CPU is meant.
        "use_cpu": not torch.accelerator.is_available(),
    }
    if config.model.precision == "fp16":
        values["optim"] = "adamw_torch"  # a fused optimizer hides from accelerate that an overflow skipped its step
    with explain_argument_errors(train.hf):
        arguments = _OneDeviceArguments(**(values | train.hf))
    if arguments.fp16 and arguments.device.type == "cpu":
        setting = "train.hf.fp16" if train.hf.get("fp16") else f"model.precision=fp16 with train.method={train.method}"
        # Accelerate would compute in fp32 without a word.
        raise ConfigError(f"{setting}: needs a GPU; use bf16 or fp32 here")
    if arguments.world_size != world_size():
        raise ConfigError(
            f"expected {world_size()} processes (WORLD_SIZE), but the Trainer finds {arguments.world_size}; start them "
            "with torchrun or accelerate launch"
        )
    return arguments
