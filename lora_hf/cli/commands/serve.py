"""`serve`: answer over HTTP, every adapter of a base from one copy of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lora_hf.cli.terminal import named_adapters
from lora_hf.core.errors import ConfigError, how_to_install

TOKEN = "LORA_HF_TOKEN"  # the name of the variable, not a token
SERVED = ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client")


def add(verbs: Any) -> None:
    """Describes the verb."""
    parser = verbs.add_parser("serve", help="answer over HTTP")
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="NAME=DIR",
        help="outputs/<run>/adapter, or USER/NAME on the hub, and what clients call it; repeat",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="of classifiers, default: that of the first adapter's run; texts are written in fp32",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask; set a token then")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"what clients must send as a bearer token; or set {TOKEN}"
    )
    parser.add_argument(
        "--allow-loading", type=Path, metavar="DIR", help="let clients with the token load adapters from below DIR"
    )
    parser.add_argument("--max-queue", type=int, metavar="N", help="rows that wait for one base")
    parser.add_argument("--max-batch", type=int, metavar="N", help="rows of one batch")
    parser.add_argument("--max-inputs", type=int, metavar="N", help="of one request")
    parser.add_argument("--max-characters", type=int, metavar="N", help="of one text")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of one text that is written")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds that a request may take")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds to end in, after SIGTERM")
    parser.add_argument("--playground", action="store_true", help="a page to try the adapters on, at /playground")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.models.model_ids import is_hub_id

    adapters = named_adapters(options.adapter)
    token = _token(options.token_file)
    folder = options.allow_loading
    if folder is not None and token is None:
        raise ConfigError(f"--allow-loading {folder}: needs a token; give --token-file FILE, or set {TOKEN}")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--allow-loading {folder}: no such folder")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port}: expected 0 to 65535")
    _check_installed(options.playground)
    from lora_hf.serving.limits import Limits

    given = ("max_queue", "max_batch", "max_inputs", "max_characters", "max_new_tokens", "deadline")
    limits = Limits(**{name: getattr(options, name) for name in given if getattr(options, name) is not None})
    for adapter in adapters.values():
        if not is_hub_id(adapter):  # the server downloads those while it reports that it is not ready
            find_saved_model(adapter)
    from lora_hf.serving.server import listen, serve

    with listen(options.host, options.port) as listener:
        from lora_hf.serving.app import ServerState
        from lora_hf.serving.engine import Engine
        from lora_hf.serving.metrics import Metrics

        metrics = Metrics()
        engine = Engine(limits, options.precision, metrics)
        serve(engine, adapters, metrics, ServerState(token, folder), listener, options.grace, options.playground)


def _token(file: Path | None) -> str | None:
    """The token; it never comes from an argument, which everybody on the machine could read."""
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}: cannot be read: {error}") from error
    if not token or not token.isascii() or any(letter.isspace() for letter in token):
        raise ConfigError(f"--token-file {file}: expected one word of ASCII letters, digits and signs")
    return token


def _check_installed(playground: bool) -> None:
    import importlib.util

    missing = [name for name in SERVED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}: {how_to_install('serve')}")
    if playground and importlib.util.find_spec("gradio") is None:
        raise ConfigError(f"--playground needs gradio: {how_to_install('serve', 'playground')}")
