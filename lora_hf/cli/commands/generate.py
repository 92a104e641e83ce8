"""`generate`: generate texts from prompts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

from lora_hf.cli.terminal import add_adapter, add_exact, add_json, check_exact, print_rows, progress
from lora_hf.core.config.fields import field_types
from lora_hf.core.config.schema import GenerateConfig
from lora_hf.core.errors import ConfigError
from lora_hf.core.imports import heavy_imports

HELP = "generate texts from prompts"
# The keys of the config's `generate` section that have an option. Sampling follows from temperature, top_p and top_k.
DECODING = {name: kind for name, kind in field_types(GenerateConfig).items() if name not in ("do_sample", "from_base")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="one prompt, such as 'name[The Vaults], eatType[pub]'; repeat for more",
    )
    source.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help=".csv, .tsv, .jsonl, .json or .parquet with the task's column, with 'prompt' or, for a chat, 'messages'; "
        ".txt with one prompt per line",
    )
    add_decoding(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file for one text per line; a .jsonl next to it has the scores"
    )
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16", "fp16"], help="precision of the base; default: as in the run"
    )
    add_exact(parser)
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the base: faster, more memory")
    add_json(parser)


def add_decoding(parser: argparse.ArgumentParser) -> None:
    docs = {field.name: field.metadata["doc"] for field in fields(GenerateConfig)}
    for name, kind in DECODING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{docs[name]}; default: as in the run")


def decoding_of(options: argparse.Namespace, default: GenerateConfig) -> GenerateConfig:
    """Returns the decoding of the run with the options given; those of sampling turn it on."""
    overrides = {name: getattr(options, name) for name in DECODING if getattr(options, name) is not None}
    if overrides.keys() & {"temperature", "top_p", "top_k"}:
        overrides = {"num_beams": 1, **overrides, "do_sample": True}
    return default.override(**overrides)


def run(options: argparse.Namespace) -> None:
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.data.tasks.generation import TextGeneration, one_line
    from lora_hf.inference.text_files import check_text_files

    check_exact(options)
    if options.output is not None:
        check_text_files(options.output, options.input)
    saved = find_saved_model(options.adapter, options.revision, options.model)
    task = saved.task
    if not isinstance(task, TextGeneration):
        raise ConfigError(f"{options.adapter} was trained for {task.name}, which classifies; use predict instead")
    decoding = decoding_of(options, saved.generate)
    if options.input is None:
        given = [(prompt, task.context(prompt)) for prompt in options.prompt]
    else:
        given = task.read_prompts(options.input)
    prompts, contexts = [prompt for prompt, _ in given], [context for _, context in given]
    with heavy_imports():
        from lora_hf.inference.generate import Generator, write_texts

    generator = Generator.load(saved, precision=options.precision, exact=options.exact, merge=options.merge)
    stream = progress(generator.generate(contexts, decoding), total=len(prompts))
    texts = list(stream) if options.output is None else write_texts(options.output, prompts, stream)
    rows = [{"prompt": prompt, **asdict(text)} for prompt, text in zip(prompts, texts, strict=True)]
    # One text is shown as it is; of several, each is a line.
    print_rows(options, "texts", rows, (text.text if len(texts) == 1 else one_line(text.text) for text in texts))
    joined = sum("\n" in text.text for text in texts)
    if joined and (options.output is not None or (len(texts) > 1 and not options.json)):
        source = "--json prints" if options.output is None else f"{options.output.with_suffix('.jsonl')} has"
        print(f"{joined} multi-line texts are joined into one line each; {source} them as generated", file=sys.stderr)
