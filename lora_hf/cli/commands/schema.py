"""`schema`: the JSON schema of a config, for editors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lora_hf.core.errors import ConfigError

HELP = "print the JSON schema of a config, so that editors can complete and check the YAML"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the schema; default: standard output")


def run(options: argparse.Namespace) -> None:
    from lora_hf.core.atomic_io import write_json_atomic
    from lora_hf.core.config.reference import json_schema

    if options.output is None:
        print(json.dumps(json_schema(), indent=2))
        return
    try:
        write_json_atomic(options.output, json_schema())
    except OSError as error:
        raise ConfigError(f"--output {options.output}: cannot be written: {error.strerror}") from error
