"""`benchmark joint`: runs that train together on one base, against the same runs one after another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import check_record, print_json, write_record
from tools.benchmark.options import add_base, base_section


def add(kinds: Any) -> None:
    """Describes it."""
    words = "how fast runs train together on one base, against one after another"
    parser = kinds.add_parser("joint", help=words, description=words)
    add_base(parser, "fp32")
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--tasks", default="cola,mrpc,rte,stsb", metavar="TASK,...")
    parser.add_argument("--seeds", default="0", metavar="N,...", help="of every task")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="of each run")
    parser.add_argument("--r", type=int, default=8, metavar="N", help="of every adapter, lora_alpha the same")
    parser.add_argument("--targets", default="q,v", metavar="ROLE,...", help="as lora.targets in a config")
    parser.add_argument("--lr", type=float, default=1e-4, metavar="RATE")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="optimiser steps of each run")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the whole record there")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, and prints both sides."""
    from lora_hf.core.config.schema import RunConfig
    from lora_hf.experiments.suite.plan import parse_seeds

    check_record(options.output)
    base = RunConfig.from_dict(
        {
            "model": base_section(options, 0.0),
            "task": {"data_dir": options.data_dir, "max_length": 128},
            "lora": {"r": options.r, "lora_alpha": options.r, "targets": options.targets.split(",")},
            "train": {"max_steps": options.steps, "batch_size": options.batch_size, "lr": options.lr},
        },
        "benchmark",
    )
    seeds = parse_seeds(options.seeds, f"--seeds {options.seeds}")
    from tools.benchmark.joint import benchmark_joint

    result = benchmark_joint(base, options.tasks.split(","), seeds, options.rounds)
    write_record(options.output, result)
    if options.json:
        print_json(result)
        return
    for name, side in result["sides"].items():
        speed, memory = side["examples_per_second"], side["rss"]["median"] / 1e6
        spread = f"{speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f})"
        print(f"{name:10}{spread} examples/s, peak memory {memory:,.0f} MB")
    ratio = result["ratios"]["together/apart"]
    print(f"together is {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) times as fast")
    furthest = max(each["difference"] for each in result["weights_apart"].values())
    print(f"weights of the same run on both sides: at most {furthest:.1e} apart")
