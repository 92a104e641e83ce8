"""`push`: upload an adapter to the hub."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from lora_hf.cli.terminal import add_json, add_model, print_json

HELP = "upload an adapter to the hub, with a model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="outputs/<run>/adapter")
    add_model(parser)
    add("--repo-id", required=True, metavar="USER/NAME", help="created if it does not exist")
    add("--private", action="store_true", help="create a private repository")
    add("--dry-run", action="store_true", help="show the files and the model card without using the network")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from lora_hf.adapters.push import push_adapter

    push = push_adapter(options.adapter, options.repo_id, options.private, options.dry_run, options.model)
    if options.json:
        print_json({**asdict(push), "url": push.url or None})
        return
    for name, size in push.files.items():
        print(f"{size:>12,} bytes  {name}")
    print(f"\n{push.card}" if options.dry_run else f"pushed: {push.url}")
