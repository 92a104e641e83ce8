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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from lora_hf.core.errors import UserError
from lora_hf.core.imports import heavy_imports
from lora_hf.serving.limits import Limits
from lora_hf.serving.requests import AdapterVersion, ClassifyResult, Observer, Request
from lora_hf.serving.wire import describe_error, pack, receive

with heavy_imports():
    from lora_hf.serving.engine import Engine
    from lora_hf.serving.inputs import CHUNK

logger = logging.getLogger(__name__)


def describe(version: AdapterVersion) -> dict[str, Any]:
    """A served adapter as clients see it."""
    task = version.saved.task
    return {
        "name": version.name,
        "version": version.digest,
        "base": version.base,
        "task": task.name,
        "kind": task.model_kind,
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

    def serve(self, engine: Engine, messages: Iterable[dict[str, Any]]) -> None:
        """Answers all messages of `wire.receive`."""
        self.engine = engine
        # Long texts and adapters must not keep short requests waiting.
        with ThreadPoolExecutor(4, "lora_hf long") as threads:
            self._send_adapters()
            for message in messages:
                if "cancel" in message:
                    self._cancel(message["cancel"])
                elif message["size"] > CHUNK:
                    self._long[message["id"]] = False
                    threads.submit(self._answer, message)
                else:
                    self._answer(message)
            for request in list(self._requests.values()):
                request.future.cancel()

    def _answer(self, message: dict[str, Any]) -> None:
        number, call, arguments = message["id"], message["call"], message["arguments"]
        try:
            if call in ("classify", "embed", "generate"):
                self._submit(number, call, **arguments)
            else:
                self._send({"id": number, "result": getattr(self, f"_{call}")(**arguments)})
        except Exception as error:  # noqa: BLE001 - the connection must survive, and the client needs an answer
            self._fail(number, error)
        if self._long.pop(number, False):
            self._cancel(number)

    def _cancel(self, number: int) -> None:
        if number in self._long:
            self._long[number] = True
        if request := self._requests.get(number):
            request.future.cancel()

    def _submit(self, number: int, call: str, stream: bool = False, **arguments: Any) -> None:
        if stream:
            arguments["on_text"] = lambda piece: self._send({"id": number, "piece": asdict(piece)})
        request = getattr(self.engine, f"submit_{call}")(**arguments)
        self._requests[number] = request
        request.future.add_done_callback(lambda future: self._finish(number, future))
        if stream:
            self._send({"id": number, "piece": None})  # accepted

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

    def _load(self, **arguments: Any) -> dict[str, Any]:
        version = self.engine.load(**arguments)
        self._send_adapters()
        return describe(version)

    def _remove(self, name: str) -> dict[str, Any]:
        version = self.engine.remove(name)
        self._send_adapters()
        return describe(version)

    def _read_file(self, adapter: str, name: str, content: str) -> list[list[str]]:
        return self.engine.read_file(adapter, name, b64decode(content))

    def _waiting(self) -> dict[str, int]:
        return self.engine.waiting()

    def _close(self, grace: float) -> None:
        self.engine.close(grace)

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
        messages = receive(connection)
        if (options := next(messages, None)) is None:
            return
        served = EngineConnection(connection)
        with Engine(Limits(**options["limits"]), observer=served, **options["options"]) as engine:
            served.serve(engine, messages)
            engine.close(grace=0)  # nobody reads the answers


if __name__ == "__main__":
    main(sys.argv[1])
