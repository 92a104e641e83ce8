"""The options by which a verb is given adapters."""

from __future__ import annotations

import argparse

from lora_hf.core.errors import ConfigError


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, a folder or a hub id, and `--revision` of the latter."""
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="outputs/<run>/adapter, or USER/NAME on the hub"
    )
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of USER/NAME")


def named_adapters(words: list[str]) -> dict[str, str]:
    """The folders or hub ids of words like NAME=DIR, by name.

    Raises:
        ConfigError: a word without a name, or with one that another has.
    """
    adapters: dict[str, str] = {}
    for word in words:
        name, equals, adapter = word.partition("=")
        if not (name and equals and adapter) or name in adapters:
            raise ConfigError(f"--adapter {word}: expected a name of its own for each: NAME=DIR")
        adapters[name] = adapter
    return adapters
