"""The process that holds the models. It answers the requests of the HTTP process, and ends with it.

HTTP and the models do not share Python's lock like this: neither waits while the other runs Python code.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from lora_hf.core.errors import UserError
from lora_hf.serving.engine import Engine
from lora_hf.serving.inputs import CHUNK
from lora_hf.serving.limits import Limits
from lora_hf.serving.requests import AdapterVersion, ClassifyResult, Observer, Request
from lora_hf.serving.wire import Unpacker, describe_error, pack

logger = logging.getLogger(__name__)


def describe(version: AdapterVersion) -> dict[str, Any]:
    """A served adapter as clients see it."""
    task = version.saved.task
    return {
        "name": version.name,
        "version": version.digest,
        "base": version.base,
        "task": task.name,
        "kind": version.kind,
        "labels": list(task.label_names),
        "reads": list(task.text_columns) if task.verb == "predict" else ["prompt"],
        "chat": version.chat,
        "embeds": version.embeds,
    }


class EngineConnection(Observer):
    """Answers the messages that arrive on a socket with an engine."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._sending, self._listing = threading.Lock(), threading.Lock()
        self._requests: dict[int, Request] = {}
        self._long: dict[int, bool] = {}  # requests that a thread is tokenizing, and whether they were cancelled

    def on_batch(self, base: str, rows: Sequence[str], answered: Sequence[str], tokens: int, seconds: float) -> None:
        self._send({"event": "batch", "batch": [base, rows, answered, tokens, seconds]})

    def serve(self, engine: Engine, unpacker: Unpacker, first: Sequence[dict[str, Any]] = ()) -> None:
        """Answers the `first` messages and those that follow, until the other end closes the connection."""
        self.engine = engine
        # Long texts and adapters must not keep short requests waiting.
        with ThreadPoolExecutor(4, "lora_hf long") as threads:
            self._send_adapters()
            for message in first:
                self._receive(message, threads)
            while data := self.connection.recv(1 << 16):
                for message in unpacker.feed(data):
                    self._receive(message, threads)
            for request in list(self._requests.values()):
                request.future.cancel()

    def _receive(self, message: dict[str, Any], threads: ThreadPoolExecutor) -> None:
        if "cancel" in message:
            self._cancel(message["cancel"])
        elif message["size"] > CHUNK:
            self._long[message["id"]] = False
            threads.submit(self._answer, message)
        else:
            self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        number, arguments = message["id"], message["arguments"]
        try:
            getattr(self, f"_{message['call']}")(number, **arguments)
        except Exception as error:  # noqa: BLE001 - the connection must survive, and the client needs an answer
            self._fail(number, error)
        if self._long.pop(number, False):
            self._cancel(number)

    def _cancel(self, number: int) -> None:
        if number in self._long:
            self._long[number] = True
        if request := self._requests.get(number):
            request.future.cancel()

    def _classify(self, number: int, **arguments: Any) -> None:
        self._submit(number, self.engine.submit_classify, arguments)

    def _embed(self, number: int, **arguments: Any) -> None:
        self._submit(number, self.engine.submit_embed, arguments)

    def _generate(self, number: int, stream: bool, **arguments: Any) -> None:
        if stream:
            arguments["on_text"] = lambda piece: self._send({"id": number, "piece": asdict(piece)})
        self._submit(number, self.engine.submit_generate, arguments)
        if stream:
            self._send({"id": number, "piece": None})  # accepted

    def _submit(self, number: int, submit: Callable[..., Request], arguments: dict[str, Any]) -> None:
        request = submit(**arguments)
        self._requests[number] = request
        request.future.add_done_callback(lambda future: self._finish(number, future))

    def _finish(self, number: int, future: Any) -> None:
        self._requests.pop(number, None)
        if future.cancelled():
            return
        if error := future.exception():
            self._fail(number, error)
            return
        result = future.result()
        if isinstance(result, ClassifyResult):
            fields = {name: getattr(result, name) for name in ("adapter", "version", "answers", "truncated")}
        else:
            fields = asdict(result)
        self._send({"id": number, "result": fields})

    def _load(self, number: int, **arguments: Any) -> None:
        version = self.engine.load(**arguments)
        self._send_adapters()
        self._send({"id": number, "result": describe(version)})

    def _remove(self, number: int, name: str) -> None:
        version = self.engine.remove(name)
        self._send_adapters()
        self._send({"id": number, "result": describe(version)})

    def _read_file(self, number: int, adapter: str, name: str, content: str) -> None:
        self._send({"id": number, "result": self.engine.read_file(adapter, name, b64decode(content))})

    def _waiting(self, number: int) -> None:
        self._send({"id": number, "result": self.engine.waiting()})

    def _close(self, number: int, grace: float) -> None:
        self.engine.close(grace)
        self._send({"id": number, "result": None})

    def _send_adapters(self) -> None:
        with self._listing:  # of two lists, the later one must arrive last
            self._send({"event": "adapters", "adapters": [describe(version) for version in self.engine.adapters()]})

    def _fail(self, number: int, error: BaseException) -> None:
        if not isinstance(error, UserError):
            logger.error("a request failed", exc_info=error)
        self._send({"id": number, "error": describe_error(error)})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                self.connection.sendall(pack(message))
        except OSError:  # the other process is gone, and so are its clients
            logger.debug("nobody reads the answer")


def main(file: str) -> None:
    """Runs an engine with the options of the first message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the HTTP process decides when this one ends
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    logging.getLogger("lora_hf").setLevel(logging.INFO)
    with socket.socket(fileno=int(file)) as connection:
        unpacker = Unpacker()
        messages: list[dict[str, Any]] = []
        while not messages:
            data = connection.recv(1 << 16)
            if not data:
                return
            messages += unpacker.feed(data)
        options = messages[0]
        served = EngineConnection(connection)
        with Engine(Limits(**options["limits"]), observer=served, **options["options"]) as engine:
            served.serve(engine, unpacker, messages[1:])
            engine.close(grace=0)  # nobody reads the answers


if __name__ == "__main__":
    main(sys.argv[1])
