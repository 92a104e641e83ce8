"""Measures training: the sides of a comparison on the same rows, a process each, taking turns.

A ratio is taken within a round, where both sides met the same machine; medians over rounds, with the spread.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.provenance import git_state, machine, versions
from lora_hf.data.sampling import PromptSampler, number_prompts
from lora_hf.data.tasks.registry import get_task
from lora_hf.data.tokenization import encode
from lora_hf.lora.precision import resolve_precision
from lora_hf.models.load import load_tokenizer
from tools.benchmark.process import SideProcess
from tools.benchmark.work import OURS, PEAK, PEERS, Work, sides_of

logger = logging.getLogger(__name__)

MEGABATCH = 50  # batches that the Trainer's LengthGroupedSampler sorts together


class Side(Protocol):
    """What takes turns."""

    def run_round(self) -> dict[str, Any]: ...


def benchmark_train(
    config: RunConfig, against: Sequence[str], steps: int = 10, rounds: int = 5, peak_seconds: float = 0.3
) -> dict[str, Any]:
    """Measures LoRA training beside each side of `against`; the record of it.

    A round is `steps` optimiser steps of each side on the same rows; one round more at the beginning warms up and is
    not counted. `peak_seconds` go to each shape of matrix multiplication in each round.

    Returns:
        By side the speed (examples and real tokens a second), its share of the machine's bf16 multiplication peak of
        the same round, the memory in bytes; and by pair the ratios of examples a second and of the memory above the
        base's weights. What repeats has a median, a min and a max over rounds.

    Raises:
        ConfigError: an unknown side, a peer that is not installed, or what a side finds wrong with the config.
        TrainingError: the process of a side died.
    """
    task = get_task(config.task.name)
    names = sides_of(against, task.model_kind)
    if steps < 1 or rounds < 1:
        raise ConfigError(f"--steps {steps} --rounds {rounds}: expected at least 1 of each")
    config = replace(config, model=replace(config.model, precision=resolve_precision(config.model.precision)))
    rows = work_rows(config, steps)
    plain = config.to_dict()
    with ExitStack() as stack:
        sides: dict[str, SideProcess] = {}
        for name in (*names, PEAK):
            logger.info("benchmark: building %s", name)
            work = Work(name, plain, rows, rounds + 1, peak_seconds)
            sides[name] = SideProcess(work)
            stack.callback(sides[name].stop)
        measured = take_turns(sides, rounds)
        ready = {name: sides[name].ready for name in names}
        memory = {name: sides[name].finish()["memory"] for name in names}
    seconds = {name: [each["seconds"] for each in measured[name]] for name in names}
    rates = [each["rates"] for each in measured[PEAK]]
    peaks = [max(rate.values()) for rate in rates]
    tokens = sum(sum(row["attention_mask"]) for row in rows)
    return {
        "work": {
            "model": Path(config.model.name).name,
            "init": config.model.init,
            "task": task.name,
            "batch_size": config.train.batch_size,
            "rows": len(rows),
            "tokens": tokens,
            "steps": -(-len(rows) // config.train.batch_size),
            "rounds": rounds,
            "lora": plain["lora"],
            "base_dropout": config.model.dropout,
            "precision": config.model.precision,
            "group_by_prompt": config.train.group_by_prompt,
            "lr": config.train.lr,
            "seed": config.train.seed,
        },
        "sides": {
            name: {
                "examples_per_second": summary([len(rows) / each for each in times]),
                "tokens_per_second": summary([tokens / each for each in times]),
                "share_of_peak": summary(
                    [ready[name]["flops"] / each / peak for each, peak in zip(times, peaks, strict=True)]
                ),
                "seconds": times,
                "memory": memory[name],
                **ready[name],
            }
            for name, times in seconds.items()
        },
        "ratios": {
            f"{OURS}/{name}": summary([other / own for own, other in zip(seconds[OURS], seconds[name], strict=True)])
            for name in names
            if name != OURS
        },
        "memory_ratios": {
            f"{OURS}/{name}": memory[OURS]["above_base"] / memory[name]["above_base"]
            for name in names
            if name != OURS and memory[OURS]["above_base"] and memory[name]["above_base"]
        },
        "peak": {
            "bf16_flops_per_second": summary(peaks),
            "shapes": {shape: summary([rate[shape] for rate in rates]) for shape in rates[0]},
        },
        "machine": machine_in_use(),
        "versions": versions()
        | {package: importlib.metadata.version(package) for package in {PEERS[n] for n in names if n in PEERS}},
        "git": git_state(),
    }


def take_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Runs a warm-up and `rounds` rounds of every side, one side at a time; what each measured, without the warm-up.

    Each round begins with another side, so that none always follows the same one.
    """
    names = list(sides)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            outcome = sides[name].run_round()
            if number:
                measured[name].append(outcome)
            if "seconds" in outcome:
                logger.info("benchmark: round %d of %d, %s: %.2f s", number, rounds, name, outcome["seconds"])
    return measured


def spread_batches(order: Sequence[int], batch_size: int, steps: int) -> list[int]:
    """The rows of `steps` whole batches, evenly spaced over rows that stand in order of length.

    Grouping so few rows by length leaves more padding than grouping an epoch, where 50 batches are sorted at a time.
    Taken like this, the sides that group have the padding that they would have in an epoch, and the lengths are
    those of all rows.
    """
    whole = len(order) // batch_size
    if whole <= steps:
        return list(order[: steps * batch_size])
    chosen = [int((number + 0.5) * whole / steps) for number in range(steps)]
    return [index for batch in chosen for index in order[batch * batch_size : (batch + 1) * batch_size]]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def work_rows(config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """The encoded rows of a round, at their real lengths; with `group_by_prompt` all rows of the prompts among them."""
    task = get_task(config.task.name)
    rows = task.load(config.task.data_dir, [task.train_split])[task.train_split]
    pool = max(MEGABATCH, steps) * config.train.batch_size
    tokenizer = load_tokenizer(config.model)
    if config.train.group_by_prompt:
        encoded = encode(task, rows, tokenizer, config.task.max_length)
        encoded = encoded.select(list(islice(PromptSampler(_prompts(encoded), config.train.seed), pool)))
    else:
        rows = rows.shuffle(seed=config.train.seed).select(range(min(len(rows), pool)))
        encoded = encode(task, rows, tokenizer, config.task.max_length)
        encoded = encoded.select(range(min(len(encoded), pool)))  # a row with several references gives several
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if config.train.group_by_prompt:
        prompts = _prompts(encoded)
        longest = [0] * len(prompts)
        for prompt, length in zip(prompts, lengths, strict=True):
            longest[prompt] = max(longest[prompt], length)
        order = sorted(range(len(lengths)), key=lambda row: (-longest[prompts[row]], prompts[row]))
    else:
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return encoded.select(spread_batches(order, config.train.batch_size, steps)).to_list()


def _prompts(encoded: Any) -> list[int]:
    return number_prompts(encoded["labels"], encoded["input_ids"])


def machine_in_use() -> dict[str, Any]:
    """The machine, with what decides how its cores are used."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    threads = {"threads": torch.get_num_threads(), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default")}
    return machine() | threads | gpu
