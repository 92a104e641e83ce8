"""The messages between the server's two processes."""

from __future__ import annotations

import socket

from lora_hf.serving.client import EngineClient
from lora_hf.serving.limits import Limits
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.wire import pack, receive


def test_a_message_that_is_cut_off_is_dropped() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(pack({"text": "one\ntwo"}) + pack({"text": "three"})[:-1])
        assert list(receive(theirs)) == [{"text": "one\ntwo"}]


def test_a_message_may_arrive_in_parts() -> None:
    with socket.socket() as connection:
        client = EngineClient(connection, Limits(), Metrics())
        message = pack({"event": "adapters", "adapters": [{"name": "one\ntwo"}]})
        client.data_received(message[:5])
        assert client.adapters == []
        client.data_received(message[5:] + message[:3])
        assert client.adapters == [{"name": "one\ntwo"}]
