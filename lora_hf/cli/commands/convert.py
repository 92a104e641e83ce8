"""`convert`: an adapter from a checkpoint of loralib, and the reverse."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hf.cli.terminal import print_json
from lora_hf.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("convert", help="an adapter from a checkpoint of loralib, and the reverse")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=["loralib"], help="read FILE, write the adapter folder --output")
    way.add_argument(
        "--to", dest="target", choices=["loralib"], help="read the folder --adapter, write a file --output"
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="with --from: the .bin or .pt checkpoint")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="with --to: the adapter folder")
    parser.add_argument("--output", required=True, type=Path, metavar="PATH")
    parser.add_argument("--model", metavar="NAME", help="the base model; with --to the adapter names it mostly itself")
    parser.add_argument(
        "--task", metavar="NAME", help="what it was trained for, so that eval, predict, generate know it"
    )
    parser.add_argument(
        "--lora-alpha", type=float, metavar="A", help="of the loralib layers, which the file leaves out"
    )
    parser.add_argument(
        "--enable-lora", metavar="true,false,true", help="of the lora.MergedLinear layers, which the file leaves out"
    )
    parser.add_argument(
        "--partial", action="store_true", help="take a file that adapts some layers only, or lacks the head"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Converts, and says how loralib builds the layers."""
    given = {"FILE": options.file, "--adapter": options.adapter, "--lora-alpha": options.lora_alpha}
    given |= {"--enable-lora": options.enable_lora, "--partial": options.partial or None}
    wrong = ["--adapter"] if options.source else ["FILE", "--lora-alpha", "--enable-lora", "--partial"]
    for name in wrong:
        if given[name] is not None:
            raise ConfigError(f"{name} does not go with {'--from' if options.source else '--to'} loralib: leave it out")
    made = _from_loralib(options) if options.source else _to_loralib(options)
    if options.json:
        print_json(made)
        return
    for layer, build in made["layers"].items():
        print(f"{layer}: {build}")
    print(f"{'adapter' if options.source else 'checkpoint'}: {made['output']}")


def _from_loralib(options: argparse.Namespace) -> dict[str, Any]:
    if options.file is None or options.model is None:
        raise ConfigError("--from loralib: expected a FILE and --model NAME")
    if options.output.exists() and not options.output.is_dir():
        raise ConfigError(f"--output {options.output}: expected a folder, found a file")
    if options.lora_alpha is None:
        raise ConfigError(_which_alpha(options.model))
    if not 0 < options.lora_alpha < float("inf"):
        raise ConfigError(f"--lora-alpha: expected a number > 0, found {options.lora_alpha:g}")
    enable_lora = _flags(options.enable_lora)
    from lora_hf.adapters.convert.checkpoint import read_loralib
    from lora_hf.adapters.convert.loralib import load_loralib, num_labels
    from lora_hf.adapters.save_load import save_adapter
    from lora_hf.lora.target_modules import head_paths

    width = num_labels(read_loralib(options.file))
    model = _base(options.model, options.task, width)
    load_loralib(model, options.file, options.lora_alpha, enable_lora, partial=options.partial)
    if width is None and head_paths(model):
        print("no head in the file: the adapter gets that of the base model, which may be untrained", file=sys.stderr)
    save_adapter(model, options.output, task=options.task)
    return {"output": str(options.output), "layers": _builds(model)}


def _to_loralib(options: argparse.Namespace) -> dict[str, Any]:
    if options.adapter is None:
        raise ConfigError("--to loralib: expected --adapter DIR")
    if not options.output.parent.is_dir() or options.output.is_dir():
        raise ConfigError(f"--output {options.output}: expected a file in a folder that exists")
    from lora_hf.adapters.convert.loralib import num_labels, save_loralib
    from lora_hf.adapters.format import read_adapter
    from lora_hf.adapters.peft_config import PREFIX
    from lora_hf.adapters.save_load import load_adapter

    file = read_adapter(options.adapter)
    name = options.model or file.metadata.base or file.config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{options.adapter} does not name its base: expected --model NAME")
    width = num_labels({key.removeprefix(PREFIX): tensor for key, tensor in file.tensors.items()})
    model = load_adapter(_base(name, options.task or file.metadata.task, width), options.adapter)
    save_loralib(model, options.output)
    return {"output": str(options.output), "layers": _builds(model)}


def _base(name: str, task: str | None, num_labels: int | None) -> PreTrainedModel:
    """The base in fp32, headed for the task; without one, for the head in the file."""
    from lora_hf.core.config.schema import ModelConfig
    from lora_hf.data.tasks.registry import get_task
    from lora_hf.lora.architectures import ARCHITECTURES
    from lora_hf.models.load import load_base, load_model

    config = ModelConfig(name=name, precision="fp32")
    if task is not None:
        return load_base(config, get_task(task))
    model = load_model(config, None if num_labels is None else {"num_labels": num_labels})
    kind = ARCHITECTURES.get(model.config.model_type)
    if num_labels is None and kind and not kind.causal:
        raise ConfigError(f"{name} reads texts and the file holds no head that answers: expected --task NAME")
    return model


def _builds(model: PreTrainedModel) -> dict[str, str]:
    """How loralib builds the layers, by path; those of one kind that are built alike under one, `*` for the number."""
    from lora_hf.adapters.convert.loralib import loralib_layers

    kinds: dict[str, dict[str, str]] = {}
    for path, layer in loralib_layers(model).items():
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", path), {})[path] = str(layer)
    made = {}
    for kind, builds in kinds.items():
        made |= {kind: next(iter(builds.values()))} if len(set(builds.values())) == 1 else builds
    return made


def _flags(words: str | None) -> list[bool] | None:
    if words is None:
        return None
    values = [word.strip().lower() for word in words.split(",")]
    if not set(values) <= {"true", "false"}:
        raise ConfigError(f"--enable-lora: expected words like true,false,true, found {words!r}")
    return [value == "true" for value in values]


def _which_alpha(model: str) -> str:
    """What to ask for, with the alphas of the recipes for this model, or for all where there is none for it."""
    from lora_hf.core.config.loader import RECIPE_FOLDERS, load_config

    found: dict[str, dict[float, list[str]]] = {}
    for file in sorted(next(folder for folder in RECIPE_FOLDERS[1:] if folder.is_dir()).glob("*.yaml")):
        config = load_config(file)
        if config.train.method != "lora":
            continue
        alphas = found.setdefault(config.model.name.rpartition("/")[2], {})
        alphas.setdefault(config.lora.lora_alpha, []).append(file.name)
    own = model.rpartition("/")[2]
    problem = "--lora-alpha: a loralib file does not record it; expected what its layers were built with. Recipes here"
    lines = [f"{problem} (those in _repo are the authors' scripts):"]
    for name, alphas in found.items() if own not in found else [(own, found[own])]:
        each = [f"{alpha:g} ({files[0]}{', ...' if files[1:] else ''})" for alpha, files in sorted(alphas.items())]
        lines.append(f"{name}: {', '.join(each)}")
    return "\n  ".join(lines)
