"""The socket of the server, had before torch is loaded: an address in use is told at once."""

from __future__ import annotations

import errno
import socket

from lora_hf.core.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's waiting off only where a socket says that it is TCP, and so do those that it accepts: an
    # answer in two packets would come 40 ms later.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        reason = error.strerror or error
        if error.errno == errno.EADDRINUSE:
            reason = f"the port is in use; choose another with --port N, or 0 for a free one ({reason})"
        raise ConfigError(f"--host {host} --port {port}: cannot be listened to: {reason}") from error
    return listening
