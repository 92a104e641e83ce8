"""OpenAI's API over the adapters: models, chat completions, completions and embeddings."""

# No `from __future__ import annotations`: FastAPI evaluates the annotations of functions nested in functions.

import base64
import json
import secrets
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from lora_hf.serving.answers import STREAM, Texts, answer_of
from lora_hf.serving.client import EngineClient
from lora_hf.serving.openai_schema import Completion, Embeddings, Models, openai_bodies

SEEDS = 2**32
PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def add_openai(app: FastAPI, client: EngineClient) -> None:
    """Adds the paths of OpenAI's API."""
    ChatBody, CompletionBody, EmbeddingBody = openai_bodies(client.limits)
    started = int(time.time())

    @app.get("/v1/models", response_model=Models)
    async def models() -> Any:
        """Lists the adapters served, and their bases, which answer alone under their own names."""
        names = {each["name"]: each["base"] for each in client.adapters}
        bases = dict.fromkeys(base for base in names.values() if base not in names)
        parents = names | dict.fromkeys(bases)
        return {"data": [{"id": name, "created": started, "parent": base} for name, base in parents.items()]}

    @app.post("/v1/chat/completions", response_model=Completion, responses=STREAM)
    async def chat(http: Request, body: ChatBody) -> Any:  # type: ignore[valid-type]
        """Continues a chat. The chat template of the base formats it."""
        messages = [message.for_template() for message in body.messages]
        top = (body.top_logprobs or 0) if body.logprobs else None
        asked = body.max_completion_tokens or body.max_tokens
        longest = asked or client.limits.max_new_tokens
        return await _complete(client, http, body, [messages], longest, top, asked is None, ChatForm())

    @app.post("/v1/completions", response_model=Completion, responses=STREAM)
    async def complete(http: Request, body: CompletionBody) -> Any:  # type: ignore[valid-type]
        """Continues a text, which an adapter reads in the form of its task, and a base as it is."""
        several = isinstance(body.prompt, list) and isinstance(body.prompt[0], str)
        prompts = body.prompt if several else [body.prompt]
        return await _complete(client, http, body, prompts, body.max_tokens, body.logprobs, False, TextForm())

    @app.post("/v1/embeddings", response_model=Embeddings)
    async def embed(http: Request, body: EmbeddingBody) -> Any:  # type: ignore[valid-type]
        """Embeds texts with an adapter of an encoder, or with its base alone."""
        inputs = [body.input] if isinstance(body.input, str) else body.input
        pending = client.submit("embed", {"model": body.model, "inputs": inputs}, sum(map(len, inputs)))
        result = await answer_of(http.receive, pending)
        encode: Callable[[list[float]], Any] = _base64 if body.encoding_format == "base64" else list
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(result["vectors"])
        ]
        tokens = result["prompt_tokens"]
        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": usage})


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def _complete(
    client: EngineClient,
    http: Request,
    body: Any,
    prompts: Sequence[Any],
    max_new_tokens: int | None,
    top_logprobs: int | None,
    fit: bool,
    form: "ChatForm | TextForm",
) -> Any:
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    decoding = {"num_beams": 1, "max_new_tokens": max_new_tokens}
    decoding |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    common = {"adapter": body.model, "stop": stop, "top_logprobs": top_logprobs, "fit": fit}
    texts = Texts(client, bool(body.stream))
    for prompt in prompts:
        for choice in range(body.n or 1):
            arguments = {"prompt": prompt, "decoding": {**decoding, "seed": (seed + choice) % SEEDS}, **common}
            texts.submit(arguments, _size(prompt))
    head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    if texts.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await texts.response(_chunks(head, texts, len(prompts), usage, form), _data)
    results = await texts.results(http.receive)
    choices = [
        form.choice(index, result["text"], None if top_logprobs is None else result["tokens"], result["finish_reason"])
        for index, result in enumerate(results)
    ]
    head |= {"object": form.kind, "system_fingerprint": results[0]["version"]}
    return JSONResponse({**head, "choices": choices, "usage": _usage(results, len(prompts))})


def _size(prompt: Any) -> int:
    """The number of characters to tokenize."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(each["content"]) if isinstance(each, dict) else 1 for each in prompt)


def _usage(results: Sequence[dict[str, Any]], prompts: int) -> dict[str, int]:
    """The choices for one prompt have read it once."""
    read = sum(result["prompt_tokens"] for result in results[:: len(results) // prompts])
    written = sum(result["completion_tokens"] for result in results)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def _chunks(
    head: dict[str, Any], texts: Texts, prompts: int, usage: bool, form: "ChatForm | TextForm"
) -> AsyncIterator[bytes]:
    """The server-sent events of the texts, as they are generated."""
    head = {**head, "object": form.chunk_kind, "system_fingerprint": None}

    def event(*choices: dict[str, Any], **more: Any) -> bytes:
        return _data({**head, "choices": choices, **more})

    for index in range(len(texts.requests)):
        if first := form.first(index):
            yield event(first)
    async for index, piece in texts.pieces():
        if piece is not None:
            yield event(form.delta(index, piece["text"], piece["tokens"] or None, None))
        else:
            yield event(form.delta(index, "", None, texts.requests[index].future.result()["finish_reason"]))
    if usage:
        results = [request.future.result() for request in texts.requests]
        yield event(usage=_usage(results, prompts))
    yield b"data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


class ChatForm:
    """How chat completions write a choice."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, text: str, tokens: Any, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def first(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, tokens: Any, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        if tokens is None:
            return None
        content = [
            {**_token(each["text"], each["logprob"]), "top_logprobs": [_token(*top) for top in each["top"]]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class TextForm:
    """How completions write a choice."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, index: int, text: str, tokens: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def first(self, index: int) -> None:
        """A text has no role, so nothing precedes it."""

    delta = choice

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        if tokens is None:
            return None
        texts = [each["text"] for each in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [each["logprob"] for each in tokens],
            "top_logprobs": [dict(each["top"]) for each in tokens],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }
