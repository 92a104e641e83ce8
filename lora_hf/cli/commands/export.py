"""`export`: an adapter in the format of another program."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lora_hf.adapters.export.targets import TARGETS, export_adapter
from lora_hf.cli.terminal import add_json, add_model, print_json

HELP = "write an adapter for llama.cpp, Ollama, mlx-lm or vLLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="outputs/<run>/adapter, or USER/NAME on the hub")
    add_model(parser)
    add(
        "--to",
        required=True,
        choices=TARGETS,
        help="; ".join(f"{target}: {written}" for target, written in TARGETS.items()),
    )
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--ollama-base", metavar="NAME", help="with --to ollama: FROM in the Modelfile; default: ./base.gguf")
    add("--overwrite", action="store_true", help="replace the output of an earlier export")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    record = export_adapter(
        options.adapter, options.to, options.output, options.model, options.overwrite, options.ollama_base
    )
    if options.json:
        print_json({"output": str(options.output), **asdict(record)})
        return
    for name, size in record.files.items():
        print(f"{size:>12,} bytes  {options.output / name}")
    for note in record.notes:
        print(f"next: {note}")
