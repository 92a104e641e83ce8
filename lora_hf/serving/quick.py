"""The way of most requests past the framework: one that is right is read, answered and sent at once.

The framework's own steps cost more than a request's share of a batch, and keep the thread of the model from Python's
lock. Whatever is unusual goes the framework's way, with the body that was read, and is told there what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from lora_hf.core.errors import UserError
from lora_hf.serving.gate import again, respond

JSON = b"application/json"


class Quick:
    """ASGI middleware for requests that POST JSON to one path.

    Args:
        model: of the body.
        answer: makes of the body, and of ASGI's `receive`, what is sent back as JSON.
        told: the response to an error of `answer`.
    """

    def __init__(
        self,
        app: Any,
        path: str,
        model: type[BaseModel],
        answer: Callable[[Any, Any], Awaitable[Any]],
        told: Callable[[UserError], Any],
    ) -> None:
        self.app, self.path, self.model, self.answer, self.told = app, path, model, answer, told

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        ours = scope["type"] == "http" and scope["path"] == self.path and scope["method"] == "POST"
        if not ours or (b"content-type", JSON) not in scope["headers"]:
            await self.app(scope, receive, send)
            return
        message = await receive()
        try:
            asked = self.model.model_validate_json(message.get("body", b""))
        except ValidationError:
            await self.app(scope, again(message, receive), send)
            return
        scope["route"] = self  # the metrics go by its path, as by that of the framework's routes
        try:
            body = json.dumps(await self.answer(asked, receive)).encode()
        except UserError as error:
            await self.told(error)(scope, receive, send)
            return
        await respond(send, 200, body)
