"""The options by which a verb is given an adapter."""

from __future__ import annotations

import argparse


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, a folder or a hub id, and `--revision` of the latter."""
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="outputs/<run>/adapter, or USER/NAME on the hub"
    )
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of USER/NAME")
