"""Measures answering: rows of several adapters on one base, by mixed batches and by what else there is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import random
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.provenance import git_state, versions
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.glue import GLUE, RULE_SENTIMENT
from lora_hf.data.tokenization import encode
from lora_hf.lora.precision import resolve_precision
from lora_hf.models.load import load_tokenizer
from tools.benchmark.process import SideProcess
from tools.benchmark.train import machine_in_use, summary, take_turns
from tools.benchmark.work import Work

logger = logging.getLogger(__name__)

SIDES = ("mixed", "apart", "merged", "peft-names", "peft-names-bf16")


def benchmark_infer(config: RunConfig, rows: int = 64, rounds: int = 5) -> dict[str, Any]:
    """Measures how fast rows of eight adapters are answered; the record of it.

    The rows are of the development sets of GLUE's eight tasks at their real lengths, as many of each, in random order;
    without GLUE's files those of the embedded task, dealt to eight adapters. Each adapter has random weights.

    Returns:
        By side the rows a second, and the ratio of `mixed` to each other side, medians with their spread.

    Raises:
        ConfigError: fewer rows than adapters, or peft is not installed.
        TrainingError: the process of a side died.
    """
    if rows < len(GLUE) or rounds < 1:
        raise ConfigError(f"--rows {rows} --rounds {rounds}: expected at least {len(GLUE)} and 1")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("benchmark infer: peft is not installed; run pip install peft")
    config = replace(config, model=replace(config.model, precision=resolve_precision(config.model.precision)))
    inputs = _rows(config, rows)
    plain = config.to_dict()
    with ExitStack() as stack:
        sides: dict[str, SideProcess] = {}
        for name in SIDES:
            logger.info("benchmark: building %s", name)
            sides[name] = SideProcess(Work(name, plain, inputs, rounds + 1, 0.0))
            stack.callback(sides[name].stop)
        measured = take_turns(sides, rounds)
        ends = {name: sides[name].finish() for name in SIDES}
    seconds = {name: [each["seconds"] for each in measured[name]] for name in SIDES}
    tokens = sum(len(row["input_ids"]) for row in inputs)
    return {
        "work": {
            "model": Path(config.model.name).name,
            "init": config.model.init,
            "adapters": len({row["adapter"] for row in inputs}),
            "batch_size": config.train.eval_batch_size,
            "rows": len(inputs),
            "tokens": tokens,
            "rounds": rounds,
            "lora": plain["lora"],
            "precision": config.model.precision,
        },
        "sides": {
            name: {"rows_per_second": summary([len(inputs) / each for each in times]), "seconds": times} | ends[name]
            for name, times in seconds.items()
        },
        "ratios": {
            f"mixed/{name}": summary([b / a for a, b in zip(seconds["mixed"], seconds[name], strict=True)])
            for name in SIDES[1:]
        },
        "machine": machine_in_use(),
        "versions": versions() | {"peft": importlib.metadata.version("peft")},
        "git": git_state(),
    }


def _rows(config: RunConfig, rows: int) -> list[dict[str, Any]]:
    """The encoded rows, each with the name of its adapter."""
    tokenizer, share = load_tokenizer(config.model), rows // len(GLUE)
    found: list[dict[str, Any]] = []
    tasks: list[Task] = [RULE_SENTIMENT] * len(GLUE) if config.task.name == RULE_SENTIMENT.name else list(GLUE)
    for number, task in enumerate(tasks):
        split = task.evaluation_splits[0]
        part = task.load(config.task.data_dir, [split])[split].shuffle(seed=number)
        part = encode(task, part.select(range(min(share, len(part)))), tokenizer, config.task.max_length)
        keys = [key for key in part.column_names if key in tokenizer.model_input_names]
        found += [{key: row[key] for key in keys} | {"adapter": f"adapter{number}"} for row in part.to_list()]
    random.Random(config.train.seed).shuffle(found)
    return found
