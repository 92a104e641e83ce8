"""Measures methods and libraries side by side: `python -m tools.benchmark VERB`.

`lora-hf benchmark glue|nlg` is the other one: it trains and scores many tasks on a user's base.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_hf.cli.main import exit_code_of
from lora_hf.cli.terminal import check_record, print_json, write_record
from tools.benchmark import joint_command, quantised
from tools.benchmark.options import add_base, base_section

MEASURED = {
    "train": "how fast methods and libraries train",
    "infer": "how fast adapters answer",
    "profile": "where the time of a training step goes",
    "serve": "how a server answers many clients",
}
VERBS = (*MEASURED, "joint", "quantised")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="VERB")
    for what, words in MEASURED.items():
        _add_measured(kinds.add_parser(what, help=words, description=words))
    joint_command.add(kinds)
    quantised.add(kinds)
    options = parser.parse_args(arguments)
    return exit_code_of(lambda: options.run(options), "benchmark")


def _add_measured(parser: argparse.ArgumentParser) -> None:
    add_base(parser, "auto")
    parser.add_argument("--task", default="rule-sentiment", metavar="NAME")
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 16, 8 for generation, 64 to infer")
    parser.add_argument("--r", type=int, default=16, metavar="N", help="of every adapter, lora_alpha the same")
    parser.add_argument("--targets", default="all", metavar="ROLE,...", help="as lora.targets in a config")
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="infer: rows of a round, of all tasks")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="serve: that ask at once")
    parser.add_argument("--adapters", type=int, default=8, metavar="N", help="serve: of one base")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="serve: of the load")
    parser.add_argument("--replacements", type=int, default=10, metavar="N", help="serve: of adapters, during the load")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="lora_dropout of every side")
    parser.add_argument("--base-dropout", type=float, default=0.0, metavar="P", help="the base's own, on every side")
    parser.add_argument(
        "--group-by-prompt", action="store_true", help="generation: all rows of a prompt, which our sides group"
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="optimiser steps of a round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="counted rounds, after one that is not")
    parser.add_argument(
        "--against",
        default="full",
        metavar="SIDE,...",
        help="peft (peft-default and peft-best), loralib, full, head, frozen (no adapter: the bound), without-dropout",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the whole record there")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, and prints a line a side."""
    from lora_hf.core.config.schema import RunConfig
    from lora_hf.data.tasks.registry import get_task

    check_record(options.output)
    size = options.batch_size
    if size is None and options.what != "infer":
        size = 8 if get_task(options.task).model_kind == "causal-lm" else 16
    sections: dict[str, dict[str, Any]] = {
        "model": base_section(options, options.base_dropout),
        "task": {"name": options.task, "data_dir": options.data_dir},
        "lora": {
            "r": options.r,
            "lora_alpha": options.r,
            "lora_dropout": options.dropout,
            "targets": options.targets.split(","),
        },
        "train": {
            "batch_size": size or 16,
            "eval_batch_size": size or 64,
            "group_by_prompt": options.group_by_prompt,
        },
    }
    config = RunConfig.from_dict(sections, "benchmark")
    if options.what == "infer":
        from tools.benchmark.infer import benchmark_infer

        result = benchmark_infer(config, options.rows, options.rounds)
    elif options.what == "serve":
        from tools.benchmark.serving import benchmark_serving

        result = benchmark_serving(
            config, options.clients, options.adapters, options.seconds, options.replacements, options.rows
        )
    elif options.what == "profile":
        from tools.benchmark.profile import profile_train

        result = profile_train(config, options.steps)
    else:
        from tools.benchmark.train import benchmark_train

        result = benchmark_train(config, options.against.split(","), options.steps, options.rounds)
    write_record(options.output, result)
    if options.json:
        print_json(result)
        return
    if options.what == "serve":
        _print_served(result)
        return
    for purpose, share in result.get("shares", {}).items():
        print(f"{purpose:32}{share:6.1%}")
    for name, side in result.get("sides", {}).items():
        print(
            f"{name:18}{_spread(side['rows_per_second'])} rows/s" if options.what == "infer" else _trained(name, side)
        )
    for name, ratio in result.get("ratios", {}).items():
        memory = result.get("memory_ratios", {}).get(name)
        print(f"{name:22} {_spread(ratio)}x" + (f", memory {memory:.2f}x" if memory else ""))


def _print_served(result: dict[str, Any]) -> None:
    for name in ("one_at_a_time", "together"):
        part = result[name]
        print(
            f"{name:18}{part['per_second']:9.1f} requests/s  p50 {part['p50_ms']:.1f} ms  p99 {part['p99_ms']:.1f} ms  "
            f"{part['errors']} errors, {part['wrong']} wrong"
        )
    replaced = result["replaced"]
    print(f"{'ratio':18}{result['ratio']:9.2f}x  {replaced['times']} adapters replaced, {replaced['failed']} failed")
    print(f"{'started again in':18}{result['started_again_in_seconds']:9.1f} s")


def _trained(name: str, side: dict[str, Any]) -> str:
    share, memory = side["share_of_peak"]["median"], side["memory"]["above_base"] or 0
    speed = f"{name:18}{_spread(side['examples_per_second'])} examples/s"
    return f"{speed}  {share:6.1%} of the matrix peak  {memory / 1e6:8.1f} MB above the base"


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
