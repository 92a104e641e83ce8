"""`infer`: the speed of inference with several adapters on one base, in mixed batches and in other ways."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError
from lora_hf.data.tasks.base import Task
from lora_hf.data.tasks.glue import GLUE, RULE_SENTIMENT
from lora_hf.data.tokenization import encode
from lora_hf.models.load import load_tokenizer
from tools.benchmark.job import INFER_SIDES, Job, require_package
from tools.benchmark.rounds import environment, measure, speedup, spread, with_resolved_precision


def benchmark_infer(config: RunConfig, rows: int = 64, rounds: int = 5) -> dict[str, Any]:
    """Measures inference on rows of eight adapters with random weights, and returns the record.

    The rows come in random order from the validation sets of the eight GLUE tasks, equally many from each, at their
    real lengths. For the bundled task they are divided among eight adapters.

    Returns:
        For each side the rows per second, and the ratio of `mixed` to it: medians with min and max over rounds.

    Raises:
        ConfigError: fewer rows than adapters, or peft is not installed.
        TrainingError: the process of a side ended early.
    """
    if rows < len(GLUE) or rounds < 1:
        raise ConfigError(f"--rows {rows} --rounds {rounds}: expected at least {len(GLUE)} and 1")
    require_package("peft", "benchmark infer")
    config = with_resolved_precision(config)
    inputs = inference_rows(config, rows)
    values = config.to_dict()
    sides = measure({name: Job(name, values, inputs, rounds + 1) for name in INFER_SIDES})
    return {
        "work": {
            "model": Path(config.model.name).name,
            "init": config.model.init,
            "adapters": len({row["adapter"] for row in inputs}),
            "batch_size": config.train.eval_batch_size,
            "rows": len(inputs),
            "tokens": sum(len(row["input_ids"]) for row in inputs),
            "rounds": rounds,
            "lora": values["lora"],
            "precision": config.model.precision,
        },
        "sides": {
            name: {
                "rows_per_second": spread([len(inputs) / each for each in side.seconds]),
                "seconds": side.seconds,
                **side.done,
            }
            for name, side in sides.items()
        },
        "ratios": {
            f"mixed/{name}": speedup(sides["mixed"].seconds, side.seconds)
            for name, side in sides.items()
            if name != "mixed"
        },
        **environment(["peft"]),
    }


def inference_rows(config: RunConfig, count: int) -> list[dict[str, Any]]:
    """About `count` encoded rows, each with the name of its adapter."""
    tokenizer, share = load_tokenizer(config.model), count // len(GLUE)
    rows: list[dict[str, Any]] = []
    tasks: list[Task] = [RULE_SENTIMENT] * len(GLUE) if config.task.name == RULE_SENTIMENT.name else list(GLUE)
    for number, task in enumerate(tasks):
        split = task.evaluation_splits[0]
        part = task.load(config.task.data_dir, [split])[split].shuffle(seed=number)
        part = encode(task, part.select(range(min(share, len(part)))), tokenizer, config.task.max_length)
        keys = [key for key in part.column_names if key in tokenizer.model_input_names]
        rows += [{key: row[key] for key in keys} | {"adapter": f"adapter{number}"} for row in part.to_list()]
    random.Random(config.train.seed).shuffle(rows)
    return rows
