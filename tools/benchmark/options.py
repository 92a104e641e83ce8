"""The options that say which base is measured."""

from __future__ import annotations

import argparse
from typing import Any


def add_base(parser: argparse.ArgumentParser, precision: str) -> None:
    """The base, where its weights and tokenizer come from, and its precision, by default `precision`."""
    parser.add_argument("--model", default="tiny-roberta", metavar="NAME")
    parser.add_argument("--init", default="pretrained", choices=["pretrained", "random"])
    parser.add_argument("--tokenizer", metavar="NAME", help="a hub id or folder, where it is not the model's own")
    parser.add_argument(
        "--precision", default=precision, choices=["auto", "fp32", "bf16", "fp16"], help="of our frozen base"
    )


def base_section(options: argparse.Namespace, dropout: float) -> dict[str, Any]:
    """The `model` section of a config that these options mean."""
    return {
        "name": options.model,
        "init": options.init,
        "tokenizer": options.tokenizer,
        "precision": options.precision,
        "dropout": dropout,
    }
