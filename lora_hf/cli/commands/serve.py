"""`serve`: answer over HTTP with many adapters per base."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path

from lora_hf.cli.terminal import add_exact, add_model, check_exact, parse_named_adapters, require_packages
from lora_hf.core.errors import ConfigError

HELP = "serve adapters over HTTP"
TOKEN_VARIABLE = "LORA_HF_TOKEN"
REQUIRED_PACKAGES = ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client")
LIMITS = ("max_queue", "max_batch", "max_inputs", "max_characters", "max_new_tokens", "deadline", "max_connections")
MIN_TOKEN = 16  # characters where others can try tokens; a limit of tries would shut out all behind one proxy
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--adapter",
        required=True,
        action="append",
        metavar="NAME=DIR",
        help="the name that clients use, and outputs/<run>/adapter or USER/NAME on the hub; repeat for more",
    )
    add_model(parser)
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="precision of the bases; default: as in the first adapter's run; quantized bases stay quantized",
    )
    add_exact(parser)
    add("--merge", action="store_true", help="merge an adapter into its base while it is the only one")
    add("--host", default="127.0.0.1", help="0.0.0.0 also accepts other machines, with a token; default: 127.0.0.1")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name that clients may use (their Host header); '*' allows any; repeat for more",
    )
    add("--port", type=int, default=8000, help="0 picks a free port; default: 8000")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file with the bearer token that clients must send; default: ${TOKEN_VARIABLE}, otherwise no token",
    )
    add("--allow-loading", type=Path, metavar="DIR", help="let clients with the token load adapters from below DIR")
    add("--max-queue", type=int, metavar="N", help="rows that may wait for one base")
    add("--max-batch", type=int, metavar="N", help="rows per batch")
    add("--max-inputs", type=int, metavar="N", help="inputs per request")
    add("--max-characters", type=int, metavar="N", help="characters per text")
    add("--max-new-tokens", type=int, metavar="N", help="tokens per generated text")
    add("--max-connections", type=int, metavar="N", help="connections open at a time")
    add("--deadline", type=float, metavar="S", help="seconds that a request may take")
    add("--grace", type=float, default=30.0, metavar="S", help="seconds to finish requests after SIGTERM; default: 30")


def run(options: argparse.Namespace) -> None:
    from lora_hf.adapters.resolve import find_saved_model
    from lora_hf.models.model_ids import is_hub_id

    adapters = parse_named_adapters(options.adapter)
    token = _read_token(options.token_file)
    if token is None and not _is_loopback(options.host):
        raise ConfigError(
            f"--host {options.host}: other machines could use the server without a token; give --token-file or set "
            f"{TOKEN_VARIABLE} to a secret that is hard to guess, or leave out --host"
        )
    if token is not None and len(token) < MIN_TOKEN and (options.allow_host or not _is_loopback(options.host)):
        raise ConfigError(
            f"the token is too short for a server that others can reach: expected at least {MIN_TOKEN} characters, "
            f"found {len(token)}; 'openssl rand -hex 16' makes one"
        )
    check_exact(options)
    adapter_root = options.allow_loading
    if adapter_root is not None and token is None:
        raise ConfigError(f"--allow-loading {adapter_root}: needs a token; give --token-file or set {TOKEN_VARIABLE}")
    if adapter_root is not None and not adapter_root.is_dir():
        raise ConfigError(f"--allow-loading {adapter_root}: no such folder")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port: expected 0 to 65535, found {options.port}")
    require_packages("serve", "serve", REQUIRED_PACKAGES)
    from lora_hf.serving.limits import Limits

    limits = Limits(**{name: getattr(options, name) for name in LIMITS if getattr(options, name) is not None})
    for adapter in adapters.values():
        if not is_hub_id(adapter):  # the server downloads those while it reports that it is not ready
            find_saved_model(adapter, model=options.model)
    from lora_hf.serving.server import listen, serve

    engine = {name: getattr(options, name) for name in ("precision", "model", "exact", "merge")}
    with listen(options.host, options.port) as listener:  # before the models' process starts
        from lora_hf.serving.app import ServerState

        state = ServerState(token, adapter_root, _allowed_hosts(options.host, options.allow_host))
        serve(adapters, limits, state, listener, options.grace, **engine)


def _read_token(file: Path | None) -> str | None:
    """The token; never from an argument, which every user of the machine could read."""
    if file is None:
        source, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
        if token is None:
            return None
    else:
        source = f"--token-file {file}"
        try:
            token = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read: {error}") from error
    token = token.strip()
    if not token or not token.isascii() or any(character.isspace() for character in token):
        raise ConfigError(f"{source}: expected one word of ASCII characters{'' if token else ', found none'}")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allowed_hosts(host: str, more: list[str]) -> frozenset[str] | None:
    return None if "*" in more else frozenset(name.lower().strip("[]") for name in (*LOOPBACK, host, *more))
