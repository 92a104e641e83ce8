"""`convert`: adapters from loralib checkpoints, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hf.cli.terminal import add_json, print_json
from lora_hf.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_hf.data.tasks.base import ModelKind

HELP = "convert a loralib checkpoint into an adapter, or an adapter into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from", dest="source", choices=["loralib"], help="read the checkpoint FILE and write an adapter folder"
    )
    direction.add_argument("--to", dest="target", choices=["loralib"], help="read --adapter and write a checkpoint")
    add("file", nargs="?", type=Path, metavar="FILE", help="with --from: the .bin or .pt checkpoint")
    add("--adapter", type=Path, metavar="DIR", help="with --to: the adapter folder")
    add("--output", required=True, type=Path, metavar="PATH", help="the folder or file to write")
    add(
        "--model",
        metavar="NAME_OR_FOLDER",
        help="the base model; default with --to: as recorded in the adapter",
    )
    add("--task", metavar="NAME", help="the task of the adapter; eval, predict and generate need it")
    add(
        "--lora-alpha", type=float, metavar="A", help="with --from: alpha of the layers, which the file does not record"
    )
    add(
        "--enable-lora",
        metavar="true,false,true",
        help="with --from: enable_lora of lora.MergedLinear layers, which the file does not record",
    )
    add("--partial", action="store_true", help="with --from: accept a file without all layers or without the head")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    read, write = {"--adapter": options.adapter}, {"FILE": options.file, "--lora-alpha": options.lora_alpha}
    write |= {"--enable-lora": options.enable_lora, "--partial": options.partial or None}
    for name, value in (read if options.source else write).items():
        if value is not None:
            raise ConfigError(f"{name} cannot be used with {'--from' if options.source else '--to'} loralib")
    model = _from_loralib(options) if options.source else _to_loralib(options)
    layers = _layer_constructors(model)
    if options.json:
        print_json({"output": str(options.output), "layers": layers})
        return
    for path, constructor in layers.items():
        print(f"{path}: {constructor}")
    print(f"{'adapter' if options.source else 'checkpoint'}: {options.output}")


def _from_loralib(options: argparse.Namespace) -> PreTrainedModel:
    if options.file is None or options.model is None:
        raise ConfigError("--from loralib: expected a FILE and --model NAME")
    if options.output.exists() and not options.output.is_dir():
        raise ConfigError(f"--output {options.output}: expected a folder, found a file")
    if options.lora_alpha is None:
        raise ConfigError(
            "--lora-alpha: required, because a loralib file does not record it; the recipes in configs/*_repo.yaml "
            "have the values of the authors' scripts"
        )
    if not 0 < options.lora_alpha < float("inf"):
        raise ConfigError(f"--lora-alpha: expected a number > 0, found {options.lora_alpha:g}")
    enable_lora = None if options.enable_lora is None else _true_or_false(options.enable_lora)
    from lora_hf.adapters.convert.checkpoint import read_loralib
    from lora_hf.adapters.convert.loralib import load_loralib, num_labels
    from lora_hf.adapters.save_load import save_adapter
    from lora_hf.lora.heads import head_paths

    labels = num_labels(read_loralib(options.file))
    model = _load_base(options.model, options.task, labels)
    load_loralib(model, options.file, options.lora_alpha, enable_lora, partial=options.partial)
    if labels is None and head_paths(model):
        print("the file has no head: the adapter gets the base model's, which may be untrained", file=sys.stderr)
    save_adapter(model, options.output, task=options.task)
    return model


def _to_loralib(options: argparse.Namespace) -> PreTrainedModel:
    if options.adapter is None:
        raise ConfigError("--to loralib: expected --adapter DIR")
    if not options.output.parent.is_dir() or options.output.is_dir():
        raise ConfigError(f"--output {options.output}: expected a file in an existing folder")
    from lora_hf.adapters.convert.loralib import num_labels, save_loralib
    from lora_hf.adapters.format import base_of, read_adapter
    from lora_hf.adapters.infer_task import MODEL_KINDS
    from lora_hf.adapters.peft_config import PREFIX
    from lora_hf.adapters.save_load import load_adapter
    from lora_hf.data.tasks.registry import task_names

    file = read_adapter(options.adapter)
    name = options.model or base_of(file.config, file.metadata)
    if not name:
        raise ConfigError(f"{options.adapter} does not name its base: expected --model NAME")
    found = num_labels({key.removeprefix(PREFIX): tensor for key, tensor in file.tensors.items()})
    labels = file.metadata.num_labels or found
    recorded = file.metadata.task if file.metadata.task in task_names() else None
    kind = MODEL_KINDS.get(file.config.get("task_type") or "")
    model = load_adapter(_load_base(name, options.task or recorded, labels, kind), options.adapter)
    save_loralib(model, options.output)
    return model


def _load_base(name: str, task: str | None, num_labels: int | None, kind: ModelKind | None = None) -> PreTrainedModel:
    """The base in fp32, with the head for the task, or without a task for `num_labels`; `kind` is that of the head."""
    from lora_hf.core.config.schema import ModelConfig
    from lora_hf.data.tasks.registry import get_task
    from lora_hf.lora.architectures import ARCHITECTURES
    from lora_hf.models.load import load_base, load_model, read_config

    config = ModelConfig(name=name, precision="fp32")
    if task is not None:
        return load_base(config, get_task(task))
    if num_labels is None and kind is None:
        architecture = ARCHITECTURES.get(read_config(config, {}).model_type)
        if architecture and not architecture.causal:
            raise ConfigError(f"{name} is not a causal language model and the file has no head: expected --task NAME")
    return load_model(
        config,
        kind or ("causal-lm" if num_labels is None else "sequence-classification"),
        None if num_labels is None else {"num_labels": num_labels},
    )


def _layer_constructors(model: PreTrainedModel) -> dict[str, str]:
    """The loralib constructor of each layer by path, with `*` for the layer number where all layers agree."""
    from lora_hf.adapters.convert.loralib import loralib_layers
    from lora_hf.lora.target_modules import with_stars

    groups: dict[str, dict[str, str]] = {}
    for path, layer in loralib_layers(model).items():
        groups.setdefault(with_stars(path), {})[path] = str(layer)
    constructors = {}
    for pattern, layers in groups.items():
        constructors |= {pattern: next(iter(layers.values()))} if len(set(layers.values())) == 1 else layers
    return constructors


def _true_or_false(argument: str) -> list[bool]:
    values = [word.strip().lower() for word in argument.split(",")]
    if not set(values) <= {"true", "false"}:
        raise ConfigError(f"--enable-lora: expected values like true,false,true, found {argument!r}")
    return [value == "true" for value in values]
