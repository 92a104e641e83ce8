"""`push`: send an adapter to the hub."""

from __future__ import annotations

import argparse
from typing import Any

from lora_hf.cli.terminal import print_json


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("push", help="send an adapter to the hub, with a model card")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="outputs/<run>/adapter")
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="made where it does not exist")
    parser.add_argument("--private", action="store_true", help="a private repository")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the files and the card; the network is not touched"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """What was sent, or would be."""
    from dataclasses import asdict

    from lora_hf.adapters.push import push_adapter

    push = push_adapter(options.adapter, options.repo_id, options.private, options.dry_run)
    if options.json:
        print_json({**asdict(push), "url": push.url or None})
        return
    for name, size in push.files.items():
        print(f"{size:>12,} bytes  {name}")
    print(f"\n{push.card}" if options.dry_run else f"pushed: {push.url}")
