"""Measures the speed and memory of training, inference and serving, and compares methods and libraries.

`lora-hf benchmark glue|nlg` is another command: it trains and scores many tasks on a base of your choice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_hf.cli.main import exit_code_of
from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import ConfigError
from tools.benchmark.job import FORMATS

Record = dict[str, Any]

# All options of all verbs, as arguments of `add_argument`. Each verb names its own, with their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "NAME", "help": "base model"},
    "init": {"choices": ["pretrained", "random"], "help": "weights of the base; random keeps only its shape"},
    "tokenizer": {"metavar": "NAME", "help": "hub id or folder of the tokenizer"},
    "precision": {"choices": ["auto", "fp32", "bf16", "fp16"], "help": "precision of our frozen base"},
    "base_dropout": {"type": float, "metavar": "P", "help": "dropout of the base"},
    "task": {"metavar": "NAME", "help": "task whose rows are used"},
    "data_dir": {"metavar": "DIR", "help": "folder with the data"},
    "r": {"type": int, "metavar": "N", "help": "rank of each adapter, and its lora_alpha"},
    "targets": {"metavar": "ROLE,...", "help": "lora.targets of each adapter"},
    "dropout": {"type": float, "metavar": "P", "help": "lora_dropout of each adapter"},
    "forms": {"metavar": "FORMAT,...", "help": "storage formats of the base"},
    "lr": {"type": float, "metavar": "RATE", "help": "learning rate"},
    "batch_size": {"type": int, "metavar": "N", "help": "rows per batch"},
    "group_by_prompt": {"action": "store_true", "help": "generation: put all rows of a prompt into one batch"},
    "steps": {"type": int, "metavar": "N", "help": "optimizer steps of each round or run"},
    "speed_steps": {"type": int, "metavar": "N", "help": "optimizer steps of each timed round"},
    "rounds": {"type": int, "metavar": "N", "help": "counted rounds of each side"},
    "against": {
        "metavar": "SIDE,...",
        "help": "sides to compare with: peft (both peft-default and peft-best), loralib, full, head, without-dropout, "
        "frozen (no adapter: the upper bound), products (only the matrix products of frozen)",
    },
    "rows": {"type": int, "metavar": "N", "help": "validation rows to classify"},
    "limit": {"type": int, "metavar": "N", "help": "validation rows to score"},
    "clients": {"type": int, "metavar": "N", "help": "concurrent clients"},
    "adapters": {"type": int, "metavar": "N", "help": "adapters on the base"},
    "replacements": {"type": int, "metavar": "N", "help": "adapters to replace under load"},
    "seconds": {"type": float, "metavar": "S", "help": "duration of the load"},
    "new_tokens": {"type": int, "metavar": "N", "help": "tokens of each text"},
    "output": {"type": Path, "metavar": "FILE", "help": "write the record to this JSON file"},
    "json": {"action": "store_true", "help": "print the record as one line of JSON"},
}
# What an option without a default means.
UNSET = {
    "tokenizer": "that of the model",
    "data_dir": "$LORA_HF_DATA_DIR, otherwise the hub",
    "batch_size": "16, or 8 for generation",
    "limit": "all",
}
BASE = {"model": "tiny-roberta", "init": "pretrained", "tokenizer": None, "precision": "auto"}
TASK = {"task": "rule-sentiment", "data_dir": None}
LORA = {"r": 16, "targets": "all"}
TRAINING = {"batch_size": None, "dropout": 0.0, "base_dropout": 0.0, "group_by_prompt": False, "steps": 10}


@dataclass(frozen=True)
class Verb:
    """A measurement: `measure` returns its record, and `report` yields the lines to print of it."""

    help: str
    defaults: dict[str, Any]
    measure: Callable[[argparse.Namespace], Record]
    report: Callable[[Record], Iterator[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        subparser = verbs.add_parser(name, help=verb.help, description=f"{verb.help[0].upper()}{verb.help[1:]}.")
        for option, default in {**verb.defaults, "output": None, "json": False}.items():
            values = OPTIONS[option] | {"default": default}
            shown = UNSET.get(option) if default is None else default
            if shown is not None and shown is not False:
                values["help"] += f"; default: {shown}"
            subparser.add_argument(f"--{option.replace('_', '-')}", **values)
    options = parser.parse_args(arguments)
    return exit_code_of(lambda: _run(VERBS[options.verb], options), "benchmark")


def _run(verb: Verb, options: argparse.Namespace) -> None:
    if options.output and not options.output.parent.is_dir():  # before measuring for minutes
        raise ConfigError(f"--output {options.output}: the folder {options.output.parent} does not exist")
    record = verb.measure(options)
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print_json(record)
    else:
        print("\n".join(verb.report(record)))


def _config(options: argparse.Namespace, **train: Any) -> Any:
    """The RunConfig of the options, with the section `train`."""
    from lora_hf.core.config.schema import RunConfig

    values = vars(options)
    sections = {
        "model": {key: values[key] for key in ("init", "tokenizer", "precision")}
        | {"name": options.model, "dropout": values.get("base_dropout", 0.0)},
        "task": {"data_dir": options.data_dir} | ({"name": options.task} if "task" in values else {"max_length": 128}),
        "lora": {
            "r": options.r,
            "lora_alpha": options.r,
            "lora_dropout": values.get("dropout", 0.0),
            "targets": options.targets.split(","),
        },
        "train": train,
    }
    return RunConfig.from_dict(sections, "benchmark")


def _training_config(options: argparse.Namespace) -> Any:
    from lora_hf.data.tasks.registry import get_task

    default = 8 if get_task(options.task).model_kind == "causal-lm" else 16
    return _config(options, batch_size=options.batch_size or default, group_by_prompt=options.group_by_prompt)


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _train(options: argparse.Namespace) -> Record:
    from tools.benchmark.train import benchmark_train

    return benchmark_train(_training_config(options), options.against.split(","), options.steps, options.rounds)


def _report_train(record: Record) -> Iterator[str]:
    for name, side in record["sides"].items():
        share, memory = side["share_of_peak"]["median"], side["memory"]["above_base"] or 0
        speed = f"{name:18}{_spread(side['examples_per_second'])} examples/s"
        yield f"{speed}  {share:6.1%} of the matmul peak  {memory / 1e6:8.1f} MB above the base"
    for name, ratio in record["ratios"].items():
        memory = record["memory_ratios"].get(name)
        yield f"{name:22} {_spread(ratio)}x" + (f", memory {memory:.2f}x" if memory else "")


def _infer(options: argparse.Namespace) -> Record:
    from tools.benchmark.infer import benchmark_infer

    return benchmark_infer(_config(options, eval_batch_size=options.batch_size), options.rows, options.rounds)


def _report_infer(record: Record) -> Iterator[str]:
    for name, side in record["sides"].items():
        yield f"{name:18}{_spread(side['rows_per_second'])} rows/s"
    for name, ratio in record["ratios"].items():
        yield f"{name:22} {_spread(ratio)}x"


def _serve(options: argparse.Namespace) -> Record:
    from tools.benchmark.serve import benchmark_serve

    numbers = (options.clients, options.adapters, options.seconds, options.replacements, options.rows)
    return benchmark_serve(_config(options), *numbers)


def _report_serve(record: Record) -> Iterator[str]:
    clients = record["work"]["clients"]
    for name, part in (("1 client", record["one_at_a_time"]), (f"{clients} clients", record["together"])):
        yield (
            f"{name:18}{part['per_second']:9.1f} requests/s  p50 {part['p50_ms']:.1f} ms  p99 {part['p99_ms']:.1f} ms  "
            f"{part['errors']} errors, {part['wrong']} wrong responses"
        )
    replaced = record["replaced"]
    yield f"{'speedup':18}{record['ratio']:9.2f}x"
    yield f"{'replaced':18}{replaced['times']:9} adapters, {replaced['failed']} failed"
    yield f"{'p99':18}{record['p99_over_p50']:9.2f}x p50, {record['p99_over_undisturbed']:.2f}x without replacements"
    yield _memory_of_server(record)
    yield f"{'restart':18}{record['started_again_in_seconds']:9.1f} s"


def _memory_of_server(record: Record) -> str:
    memory = record["memory"]
    return (
        f"{'memory':18}{memory['before_mib']:9.0f} MiB, then {memory['after_mib']:.0f}; base {memory['base_mib']:.0f}, "
        f"without models {memory['without_models_mib']:.0f}"
    )


def _serve_texts(options: argparse.Namespace) -> Record:
    from tools.benchmark.serve_texts import benchmark_texts

    return benchmark_texts(_config(options), options.clients, options.seconds, options.new_tokens)


def _report_serve_texts(record: Record) -> Iterator[str]:
    peer = record["transformers_serve"]
    parts = {name: record[name] for name in ("alone", "one_adapter", "two_adapters")}
    parts |= {f"peer, {name}": peer[name] for name in ("alone", "together") if name in peer}
    for name, part in parts.items():
        yield (
            f"{name:18}{part['tokens_per_second']:9.1f} tokens/s  first token p50 {part['first_token_p50_ms']:.0f} ms  "
            f"p99 {part['first_token_p99_ms']:.0f} ms  {part['requests']} texts, {part['errors']} errors"
        )
    yield f"{'speedup':18}{record['speedup']:9.2f}x, two adapters {record['two_adapters_over_one']:.2f}x of one"
    yield f"{_memory_of_server(record)}; {record['wrong']} wrong texts"
    if "reason" in peer:
        yield f"transformers serve: {peer['reason']}"


def _text_forms(options: argparse.Namespace) -> Record:
    from tools.benchmark.text_forms import benchmark_forms

    return benchmark_forms(_config(options), options.forms.split(","), options.new_tokens)


def _report_text_forms(record: Record) -> Iterator[str]:
    for name, side in record["forms"].items():
        yield (
            f"{name:10}base {side['base_mib']:.0f} MiB, log-probabilities {side['mean_difference']:.1e} apart (at most "
            f"{side['largest_difference']:.1e}), {side['same_next_token']:.1%} of the next tokens, "
            f"{side['equal_texts']:.0%} of the texts"
        )


def _quantised(options: argparse.Namespace) -> Record:
    from tools.benchmark.quantised import benchmark_quantised

    sizes = (options.steps, options.limit, options.speed_steps, options.rounds)
    return benchmark_quantised(options.data_dir, options.forms.split(","), *sizes, options.model, options.task)


def _report_quantised(record: Record) -> Iterator[str]:
    for name, side in record["speed"].items():
        scores = ", ".join(f"{key} {value:.4f}" for key, value in record["quality"][name]["metrics"].items())
        speed, size = _spread(side["examples_per_second"]), side["base_bytes"] / 1e6
        yield f"{name:10}{speed} examples/s, base {size:,.0f} MB, {scores}"


def _profile(options: argparse.Namespace) -> Record:
    from tools.benchmark.profile import profile_train

    return profile_train(_training_config(options), options.steps)


def _report_profile(record: Record) -> Iterator[str]:
    for purpose, share in record["shares"].items():
        yield f"{purpose:32}{share:6.1%}"


VERBS = {
    "train": Verb(
        "compare training speed and memory of methods and libraries",
        {**BASE, **TASK, **LORA, **TRAINING, "rounds": 5, "against": "full"},
        _train,
        _report_train,
    ),
    "infer": Verb(
        "compare ways to run many adapters on one base",
        {**BASE, **TASK, **LORA, "batch_size": 64, "rows": 256, "rounds": 5},
        _infer,
        _report_infer,
    ),
    "serve": Verb(
        "measure a server under the load of many clients",
        {**BASE, **TASK, **LORA, "rows": 256, "clients": 16, "adapters": 8, "seconds": 20.0, "replacements": 10},
        _serve,
        _report_serve,
    ),
    "serve-texts": Verb(
        "measure streamed texts of a server with two adapters, beside transformers serve",
        {
            **BASE,
            "task": "rule-restaurants",
            "data_dir": None,
            **LORA,
            "clients": 16,
            "seconds": 20.0,
            "new_tokens": 64,
        },
        _serve_texts,
        _report_serve_texts,
    ),
    "text-forms": Verb(
        "compare the texts of a base in bf16, int8 and nf4 with those in fp32",
        {
            **BASE,
            "precision": "fp32",
            "task": "rule-restaurants",
            "data_dir": None,
            **LORA,
            "forms": "fp32,bf16,int8,nf4",
            "new_tokens": 64,
        },
        _text_forms,
        _report_text_forms,
    ),
    "quantised": Verb(
        "compare accuracy, speed and memory of storage formats of the base",
        {
            "model": "roberta-base",
            "task": "sst2",
            "data_dir": None,
            "forms": ",".join(FORMATS),
            "steps": 400,
            "limit": None,
            "speed_steps": 4,
            "rounds": 5,
        },
        _quantised,
        _report_quantised,
    ),
    "profile": Verb(
        "show where the time of a training step goes", {**BASE, **TASK, **LORA, **TRAINING}, _profile, _report_profile
    ),
}


if __name__ == "__main__":
    sys.exit(main())
