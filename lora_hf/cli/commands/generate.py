"""`generate`: write texts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import add_adapter, print_json, progress
from lora_hf.core.errors import ConfigError

# The keys of the config's generate section that a command line may set.
DECODING = {
    "num_beams": int,
    "length_penalty": float,
    "no_repeat_ngram_size": int,
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "batch_size": int,
}


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("generate", help="write texts")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="T", help="one input, such as 'name[The Vaults], eatType[pub]'")
    source.add_argument("--input", type=Path, metavar="FILE", help="an input a line")
    for name, kind in DECODING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="default: what the run's config says")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a text a line there, and .jsonl with the scores")
    add_adapter(parser)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """A text for each prompt."""
    from dataclasses import asdict, replace

    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.data.tasks.generation import TextGeneration

    saved = find_saved_model(options.adapter, options.revision)
    task = saved.task
    if not isinstance(task, TextGeneration):
        raise ConfigError(f"{options.adapter} was trained for {task.name}, which classifies; use predict instead")
    given = {name: getattr(options, name) for name in DECODING if getattr(options, name) is not None}
    if given.keys() & {"temperature", "top_p", "top_k"}:
        given = {"num_beams": 1, **given, "do_sample": True}
    decoding = replace(saved.generate, **given)
    prompts = [options.prompt] if options.input is None else _prompts(options.input)
    contexts = [task.context(prompt) for prompt in prompts]
    from lora_hf.inference.generate import Generator, write_texts

    texts = progress(Generator.load(saved).generate(contexts, decoding), total=len(prompts))
    if options.output is not None:
        made = write_texts(options.output, prompts, texts)
        print(f"{len(made)} texts in {options.output}", file=sys.stderr)
    else:
        made = list(texts)
    lines = [{"prompt": prompt, **asdict(text)} for prompt, text in zip(prompts, made, strict=True)]
    if options.json:
        print_json({"texts": lines} if options.output is None else {"output": str(options.output), "rows": len(lines)})
    elif options.output is None:
        for text in made:
            print(text.text)


def _prompts(path: Path) -> list[str]:
    from lora_hf.data.input_files import read_rows

    return read_rows(path, ("prompt",))["prompt"]
