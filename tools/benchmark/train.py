"""`train`: the speed and memory of LoRA training compared with other methods and libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_hf.core.config.schema import RunConfig
from lora_hf.core.errors import ConfigError, TrainingError
from lora_hf.data.tasks.registry import get_task
from lora_hf.lora.precision import bf16_gain, resolve_precision
from tools.benchmark.job import OURS, PEAK, PEERS, Job, train_sides
from tools.benchmark.rounds import environment, measure, speedup, spread, with_resolved_precision
from tools.benchmark.rows import count_tokens, training_rows


def benchmark_train(
    config: RunConfig, against: Sequence[str], steps: int = 10, rounds: int = 5, peak_seconds: float = 0.3
) -> dict[str, Any]:
    """Measures LoRA training and each side of `against`, and returns the record.

    Args:
        config: the model, task and LoRA of all sides.
        against: sides of `job.OTHERS`, or `peft` for both of its settings.
        steps: optimizer steps of a round, on the same rows for every side.
        rounds: counted rounds, after a warm-up.
        peak_seconds: time for each shape of matrix multiplication in each round.

    Returns:
        For each side the examples and real tokens per second, its share of the machine's matmul peak in the same
        round (the best of all precisions), and the memory in bytes. For each pair of sides the ratio of their speeds
        and of their memory above the weights of the base. Repeated measurements have a median, a min and a max over
        rounds.

    Raises:
        ConfigError: an unknown side, a library that is not installed, or a config that a side rejects.
        TrainingError: the process of a side ended early, or a share of the peak is above 1.
    """
    task = get_task(config.task.name)
    names = train_sides(against, task.model_kind)
    if steps < 1 or rounds < 1:
        raise ConfigError(f"--steps {steps} --rounds {rounds}: expected at least 1 of each")
    config = with_resolved_precision(config)
    rows = training_rows(config, steps)
    values, fastest = config.to_dict(), resolve_precision("auto")
    measured = measure({name: Job(name, values, rows, rounds + 1, peak_seconds, fastest) for name in (*names, PEAK)})
    sides = {name: measured[name] for name in names}
    rates = [each["rates"] for each in measured[PEAK].rounds]
    peaks = [max(rate.values()) for rate in rates]
    tokens = count_tokens(rows)
    above_base = {name: side.done["memory"]["above_base"] for name, side in sides.items()}
    shares = {
        name: spread([side.ready["flops"] / each / peak for each, peak in zip(side.seconds, peaks, strict=True)])
        for name, side in sides.items()
    }
    check_shares(shares)
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
            "lora": values["lora"],
            "base_dropout": config.model.dropout,
            "precision": config.model.precision,
            "group_by_prompt": config.train.group_by_prompt,
            "lr": config.train.lr,
            "seed": config.train.seed,
        },
        "sides": {
            name: {
                "examples_per_second": spread([len(rows) / each for each in side.seconds]),
                "tokens_per_second": spread([tokens / each for each in side.seconds]),
                "share_of_peak": shares[name],
                "seconds": side.seconds,
                "memory": side.done["memory"],
                **side.ready,
            }
            for name, side in sides.items()
        },
        "ratios": {f"{OURS}/{name}": speedup(sides[OURS].seconds, sides[name].seconds) for name in names[1:]},
        "memory_ratios": {
            f"{OURS}/{name}": above_base[OURS] / above_base[name]
            for name in names[1:]
            if above_base[OURS] and above_base[name]
        },
        "peak": {
            "flops_per_second": spread(peaks),
            "shapes": {shape: spread([rate[shape] for rate in rates if shape in rate]) for shape in rates[0]},
        },
        "precision_probe": {"bf16_gain": bf16_gain(), "fastest": fastest},
        **environment({PEERS[name] for name in names if name in PEERS}),
    }


def check_shares(shares: Mapping[str, Mapping[str, float]]) -> None:
    for name, share in shares.items():
        if share["median"] > 1:
            raise TrainingError(
                f"{name} reached {share['median']:.0%} of the peak, which is impossible: the peak or the FLOPs of a "
                "step are wrong; measure again on an idle machine"
            )
