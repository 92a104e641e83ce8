"""Finds the learning rate of a config: a sweep over a few rates, on few steps, that stops the losers early."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.records import RunRecord, SweepRecord
from lora_hf.data.tasks.registry import task_of
from lora_hf.experiments.sweep.space import RATE, Space, read_sweep

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_hf.data.tasks.base import Task

logger = logging.getLogger(__name__)

RATES = ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "1e-2")
STEPS = 200
EVALUATION_SHARE = 0.5  # of the number of training rows, at most: else evaluations take as long as training
EVALUATION_ROWS = 200  # at least
EIGHTHS = (1, 2, 4, 8)  # of the steps, after which the losses of the rates are compared


def read_lr_find(path: str | Path, words: Sequence[str], rates: Sequence[str] = RATES) -> tuple[RunConfig, Space]:
    """The config, and the rates in the order of their trials: from the middle, where the best is likely, outwards.

    Raises:
        ConfigError: the recipe, the words or the rates are invalid.
    """
    try:
        ordered = sorted(rates, key=float)
    except ValueError:
        raise ConfigError(f"rates: expected numbers, such as 1e-4,1e-3; found {','.join(rates)}") from None
    if len(ordered) < 2:
        raise ConfigError(f"rates: expected at least two, such as 1e-4,1e-3; found {','.join(rates)}")
    middle = len(ordered) // 2
    from_middle = sorted(range(len(ordered)), key=lambda index: abs(index - middle))
    if any(word.partition("=")[0].strip() == RATE for word in words):
        raise ConfigError(f"{RATE}: lr-find tries several; name them with --rates")
    config, space = read_sweep(path, [*words, f"{RATE}={'|'.join(ordered[index] for index in from_middle)}"])
    if len(space.words()) > 1:
        raise ConfigError(f"lr-find varies {RATE} only; give every other key one value, or use sweep")
    return config, space


def lr_find(
    config: RunConfig,
    space: Space,
    name: str,
    steps: int = STEPS,
    pruner: str = "halving",
    rows: Mapping[str, Dataset] | None = None,
) -> tuple[Path, SweepRecord]:
    """Trains each rate of `read_lr_find` on the same rows and seed, and stops those with a larger training loss.

    `best.yaml` is the whole config with the best rate.

    Args:
        steps: of a rate that is not stopped; at most those of the config.
        pruner: `none` trains every rate to the end.
        rows: the task's splits; by default they are loaded.

    Returns:
        As `study.sweep`.

    Raises:
        As `study.sweep`.
    """
    from lora_hf.experiments.sweep.study import SweepSettings, sweep

    if steps < 1:
        raise ConfigError(f"steps: expected a whole number >= 1, found {steps}")
    task = task_of(config.task)
    rows = rows or task.load(config.task.data_dir, task.splits)
    whole = _steps_of(config, task, rows[task.train_split])
    steps = min(steps, whole)
    rungs = {max(1, steps * share // 8): share for share in EIGHTHS}
    hf = config.train.hf | {"eval_strategy": "no", "save_strategy": "no"}
    warmup = config.train.warmup_steps
    if warmup is not None:  # else a rate would still be rising when it is judged
        warmup = round(warmup * steps / whole)
    shortened = replace(config, train=replace(config.train, max_steps=steps, warmup_steps=warmup, patience=None, hf=hf))
    settings = SweepSettings(shortened, space, name, pruner=pruner, sampler="grid", rungs=rungs, recipe=config)
    logger.info("%d learning rates, each for %d to %d steps", settings.trials, min(rungs), steps)
    limit = max(
        EVALUATION_ROWS, int(EVALUATION_SHARE * steps * config.train.batch_size * config.train.gradient_accumulation)
    )
    parts = {split: part if split == task.train_split else _sample(part, limit) for split, part in rows.items()}
    return sweep(settings, rows=parts)


def advice(folder: Path, record: SweepRecord) -> str:
    """What to do, in one line."""
    best, rates = record.best, sorted(trial["values"][RATE] for trial in record.trials)
    rate, score = best["values"][RATE], best["score"]
    parts = [f"use {RATE}={format_rate(rate)}: {record.split} {record.metric} {score:.4f} after {best['steps']} steps"]
    diverged = sorted(
        (trial["values"][RATE], trial["steps"]) for trial in record.trials if trial["state"] == "diverged"
    )
    parts += [f"{format_rate(bad)} diverged at step {step}" for bad, step in diverged]
    majority = RunRecord.load(folder / best["record"]).majority.get(record.split, {}).get(record.metric)
    if majority is not None and score <= majority:
        parts.append("no rate beats the majority class yet, so use more --steps")
    if rate in (rates[0], rates[-1]):
        parts.append(f"the best may be {'lower' if rate == rates[0] else 'higher'}, so extend --rates")
    return "; ".join(parts)


def format_rate(rate: float) -> str:
    """Such as 5e-4."""
    mantissa, exponent = f"{rate:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _steps_of(config: RunConfig, task: Task, rows: Dataset) -> int:
    """The steps of a training on these rows, of which long ones are several entries."""
    train = config.train
    if train.max_steps:
        return train.max_steps
    from lora_hf.data.tokenization import encode
    from lora_hf.models.load import load_tokenizer

    entries = len(encode(task, rows, task.prepare_tokenizer(load_tokenizer(config.model)), config.task.max_length))
    return math.ceil(train.epochs * math.ceil(math.ceil(entries / train.batch_size) / train.gradient_accumulation))


def _sample(part: Dataset, limit: int) -> Dataset:
    if len(part) <= limit:
        return part
    return part.select(sorted(random.Random(0).sample(range(len(part)), limit)))
