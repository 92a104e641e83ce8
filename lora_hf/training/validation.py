"""Checks a config for contradictions and against its task, before loading torch and the data takes time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lora_hf.adapters.format import read_adapter_config
from lora_hf.core.config.fields import describe_value
from lora_hf.core.config.schema import RunConfig, TrainConfig
from lora_hf.core.errors import ConfigError, did_you_mean, how_to_install
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.registry import task_of
from lora_hf.models.model_ids import check_model_exists
from lora_hf.training.distributed import check_environment

# Values that transformers takes without a look, and that fail in the middle of a run.
LOWEST = {
    "ddp_timeout": 1,
    "eval_accumulation_steps": 1,
    "eval_delay": 0,
    "neftune_noise_alpha": 0,
    "save_total_limit": 1,
    **dict.fromkeys(("eval_steps", "logging_steps", "save_steps"), 1e-9),
}
CHOICES = {
    "torch_compile_mode": ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}
TRACKERS = ("trackio", "wandb")  # extras that only `report_to` needs


def check_run(config: RunConfig) -> None:
    """Checks a run's settings against its task and against each other.

    Raises:
        ModelError: the base does not exist.
        ConfigError: two settings exclude each other, or `train.class_weights` names no class of the task.
        AdapterError: `train.start_from` is no adapter folder.
        DataError: the task does not exist.
    """
    check_environment()
    check_model_exists(config.model.name)
    if config.model.tokenizer is not None:
        check_model_exists(config.model.tokenizer)
    task, settings = task_of(config.task), config.train
    if settings.hf:
        _check_training_arguments(settings.hf)
    if settings.group_by_prompt and task.model_kind != "causal-lm":
        raise ConfigError(f"train.group_by_prompt: {task.name} has no prompts; leave the key out")
    _check_class_weights(settings, task)
    if settings.label_smoothing and task.model_kind == "question-answering":
        raise ConfigError(f"train.label_smoothing: {task.name} learns positions, not labels; leave the key out")
    if settings.loraplus_lr_ratio is not None and settings.method != "lora":
        raise ConfigError(
            f"train.loraplus_lr_ratio: train.method={settings.method} trains no lora_B; leave the key out"
        )
    if settings.start_from and settings.method != "lora":
        raise ConfigError(
            f"train.start_from: train.method={settings.method} takes no LoRA weights from an adapter; leave the key out"
        )
    if settings.start_from:
        read_adapter_config(settings.start_from)


def _check_class_weights(settings: TrainConfig, task: Task) -> None:
    """Raises ConfigError for class weights or label smoothing that do not fit the classes of the task."""
    weights, names = settings.class_weights, task.label_names
    if not names and weights is not None:
        raise ConfigError(f"train.class_weights: {task.name} has no classes; leave the key out")
    if task.problem_type == "regression" and settings.label_smoothing:
        raise ConfigError(f"train.label_smoothing: {task.name} has no classes; leave the key out")
    for name in weights if isinstance(weights, dict) else ():
        if name not in names:
            raise ConfigError(
                f"train.class_weights: {task.name} has no class {name!r}{did_you_mean(name, names)}; expected "
                f"{', '.join(names)}"
            )


def _check_training_arguments(hf: Mapping[str, Any]) -> None:
    """Raises ConfigError for an unknown field of TrainingArguments, or a value of another type or out of range.

    Values of a right type that transformers refuses are reported by `training.arguments`.
    """
    from transformers import TrainingArguments

    kinds = get_type_hints(TrainingArguments)
    known = [field.name for field in fields(TrainingArguments)]
    problems = []
    for name, value in hf.items():
        if name not in known:
            problems.append(f"{name} is not a field of transformers.TrainingArguments{did_you_mean(name, known)}")
        elif not _has_type(value, kinds[name]):
            expected = str(getattr(kinds[name], "__name__", kinds[name])).replace("typing.", "")
            hint = (
                " (YAML reads 1e-8 as text; write 1.0e-8)" if "e" in str(value) and _has_type(0.5, kinds[name]) else ""
            )
            problems.append(f"{name}: expected {expected}, found {describe_value(value)}{hint}")
        elif isinstance(value, (int, float)) and not value >= LOWEST.get(name, value):
            problems.append(f"{name}: expected a number >= {LOWEST[name]}, found {value}")
        elif value not in CHOICES.get(name, (value,)):
            problems.append(f"{name}: expected one of {', '.join(CHOICES[name])}, found {value!r}")
    report_to = hf.get("report_to") or ()
    problems += [
        f"report_to: {tracker} is not installed: {how_to_install(tracker)}"
        for tracker in TRACKERS
        if tracker in ([report_to] if isinstance(report_to, str) else report_to) and find_spec(tracker) is None
    ]
    if problems:
        raise ConfigError(f"train.hf: {'; '.join(problems)}")


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value from YAML can be one of the type. Words and mappings stand for enums and classes."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    plain = {get_origin(option) or option for option in options}
    if value is None or Any in plain:
        return True  # transformers has fields whose default is None and whose type does not say so
    if isinstance(value, bool):
        return bool in plain or any(issubclass(option, Enum) for option in plain)  # YAML reads `no` as false
    if isinstance(value, int) and float in plain:
        return True
    if any(isinstance(value, option) for option in plain):
        return True
    others = plain - {bool, int, float, str, list, dict, NoneType}
    return isinstance(value, (str, dict)) and bool(others)
