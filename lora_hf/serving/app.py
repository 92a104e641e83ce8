"""The engine over HTTP: classify, generate, adapters, health and metrics. Every error has the same form."""

# No `from __future__ import annotations`: FastAPI evaluates the annotations of functions nested in functions.

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from lora_hf.core.errors import UserError
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.serving.answers import STREAM, Texts, answer_of, problem_of
from lora_hf.serving.client import EngineClient
from lora_hf.serving.limits import ClosingError, RefusalError, error_body
from lora_hf.serving.middleware import JSON, AccessMiddleware
from lora_hf.serving.openai import PATHS, add_openai
from lora_hf.serving.schema import (
    Adapter,
    Adapters,
    ClassifyAnswer,
    Failure,
    GenerateAnswer,
    Load,
    Rows,
    Upload,
    bodies,
)
from lora_hf.serving.wire import InternalError

HTTP_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
LIMIT_ERRORS = ("too_long", "string_too_long", "less_than_equal")  # pydantic's types for a value above a limit
CLASSIFY, PAGE = "/v1/classify", Path(__file__).with_name("page.html")
# The page runs its own script and asks its own server, and nothing else.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
JSON_HINT = f"send a JSON object with the header 'content-type: {JSON}'; see /docs for examples"


@dataclass
class ServerState:
    """Access rules, and whether the server accepts requests.

    Attributes:
        token: the bearer token that every request must send; None: no authentication.
        adapter_root: clients may load adapters from below this folder; None: they may not load any.
        hosts: the names in Host headers that the server answers to; None: any.
    """

    token: str | None = None
    adapter_root: Path | None = None
    hosts: frozenset[str] | None = None
    ready: bool = False
    draining: bool = False


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(client: EngineClient, state: ServerState, lifespan: Lifespan) -> FastAPI:
    """Builds the application, which `lifespan` connects to the engine; adapters load until `state.ready` is set."""
    errors = (400, 401, 403, 404, 405, 413, 415, 422, 431, 500, 503, 504)
    app = FastAPIOffline(
        redoc_url=None,
        title="lora_hf",
        description="Many LoRA adapters on one base, also for clients of OpenAI's API. All errors have OpenAI's form.",
        lifespan=lifespan,
        responses={status: {"model": Failure} for status in errors},
    )
    app.add_middleware(
        AccessMiddleware,
        token=state.token,
        limits=client.limits,
        metrics=client.metrics,
        hosts=state.hosts,
        page="/",
    )
    _add_error_handlers(app, state)
    _add_inference(app, client)
    add_openai(app, client)
    _add_adapters(app, client, state)
    _add_health(app, client, state)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"})

    return app


def _add_inference(app: FastAPI, client: EngineClient) -> None:
    ClassifyBody, GenerateBody = bodies(client.limits)

    @app.post(CLASSIFY, response_model=ClassifyAnswer)
    async def classify(http: Request, body: ClassifyBody) -> Any:  # type: ignore[valid-type]
        """Classifies texts, or pairs of texts: a label and the probability of each, or a score for regression."""
        size = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in body.inputs)
        pending = client.submit("classify", body.model_dump(), size)
        return JSONResponse(await answer_of(http.receive, pending))

    @app.post("/v1/generate", response_model=GenerateAnswer, responses=STREAM)
    async def generate(http: Request, body: GenerateBody) -> Any:  # type: ignore[valid-type]
        """Generates a text for a prompt; `stream` sends it piece by piece."""
        decoding = body.model_dump(exclude_none=True, exclude={"stream"})  # type: ignore[attr-defined]
        arguments = {name: decoding.pop(name, None) for name in ("adapter", "prompt", "deadline")}
        texts = Texts(client, body.stream)
        texts.submit({**arguments, "decoding": decoding}, len(body.prompt))
        if body.stream:
            return await texts.response(_events(texts), partial(_event, "error"))
        (result,) = await texts.results(http.receive)
        return JSONResponse(_generated(result))


def _generated(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in GenerateAnswer.model_fields}


async def _events(texts: Texts) -> AsyncIterator[bytes]:
    """The server-sent events of a streamed text."""
    async for _, piece in texts.pieces():
        if piece is not None:
            yield _event("text", {"text": piece["text"]})
    yield _event("done", _generated(texts.requests[0].future.result()))


def _event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def _add_adapters(app: FastAPI, client: EngineClient, state: ServerState) -> None:
    @app.get("/v1/adapters", response_model=Adapters)
    async def adapters() -> Any:
        """Lists the adapters served."""
        return {"adapters": client.adapters}

    @app.post("/v1/rows", response_model=Rows)
    async def rows(body: Upload) -> Any:
        """Reads a file of texts as `predict` and `generate` do: CSV, TSV, JSON Lines, JSON, Parquet or plain text."""
        content = b64encode(body.content).decode()
        return {"rows": await client.call("read_file", adapter=body.adapter, name=body.name, content=content)}

    @app.put("/v1/adapters/{name}", response_model=Adapter)
    async def load(name: str, body: Load) -> Any:
        """Loads an adapter, or replaces the one of that name, without interrupting the others."""
        folder = await asyncio.to_thread(_resolve_below_root, state, body.folder)
        try:
            return await client.call("load", name=name, adapter=str(folder), new_base=False)
        except RefusalError:
            raise
        except UserError as error:
            # The message names the folder; clients must not learn where the server keeps it.
            message = str(error).replace(str(folder), body.folder).replace(str(_adapter_root(state)), ".")
            raise RefusalError(message, "bad_adapter", 422) from error

    @app.delete("/v1/adapters/{name}", response_model=Adapter)
    async def remove(name: str) -> Any:
        """Removes an adapter, but answers the requests it has accepted."""
        _adapter_root(state)
        return await client.call("remove", name=name)


def _adapter_root(state: ServerState) -> Path:
    if state.adapter_root is None:
        raise RefusalError("this server does not load or remove adapters over HTTP", "loading_off", 403)
    return state.adapter_root.resolve()


def _resolve_below_root(state: ServerState, folder: str) -> Path:
    """The folder that a client names, provided that neither `..` nor links lead it or its files out of the root."""
    root = _adapter_root(state)
    refused = RefusalError(f"{folder!r} is not a folder below the server's adapter folder", "outside", 403)
    try:
        path = (root / folder).resolve()
        # A file of the adapter, or the run's config above it, may itself be a link.
        paths = [path, path.parent / RUN_CONFIG_FILE, *(path.iterdir() if path.is_dir() else ())]
        inside = path != root and all(each.resolve().is_relative_to(root) for each in paths)
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not inside or not path.is_dir():
        raise refused
    return path


def _add_health(app: FastAPI, client: EngineClient, state: ServerState) -> None:
    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Returns 200 while the process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """Returns 200 while the server takes requests; 503 while it loads adapters and after SIGTERM."""
        if state.draining:
            raise ClosingError("the server is shutting down")
        if not state.ready:
            raise _not_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Returns metrics for Prometheus."""
        waiting = await client.call("waiting", size=0) if state.ready else {}
        page = client.metrics.page(waiting, len(client.adapters))
        return Response(page, media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI, state: ServerState) -> None:
    @app.exception_handler(UserError)
    async def user_error(http: Request, error: UserError) -> Response:
        if isinstance(error, RefusalError) and error.code == "unknown_adapter" and not state.ready:
            error = _not_ready()
        body = problem_of(error)
        headers = {"retry-after": str(error.retry_after)} if getattr(error, "status", 500) == 503 else None  # type: ignore[attr-defined]
        return _response(http, getattr(error, "status", 500), body, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        problems = error.errors()
        first = problems[0]
        if first["type"] == "json_invalid":
            reason = f"{first.get('ctx', {}).get('error', 'not JSON')} at character {first['loc'][-1]}"
            return _failure(http, 400, "malformed_json", f"the body is not JSON: {reason}; {JSON_HINT}")
        content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if http.method in ("POST", "PUT") and content_type != JSON:
            message = f"the body's content-type is {content_type!r}; {JSON_HINT}"
            return _failure(http, 415, "unsupported_media_type", message)
        fields = [".".join(map(str, each["loc"][1:])) for each in problems]
        message = "; ".join(
            f"{field or 'body'}: {each['msg']}" for field, each in zip(fields[:5], problems[:5], strict=True)
        )
        too_large = all(each["type"] in LIMIT_ERRORS for each in problems)
        status, code = (413, "too_large") if too_large else (422, "invalid_request")
        return _failure(http, status, code, message, param=fields[0].partition(".")[0] or None)

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        code = HTTP_CODES.get(error.status_code, "refused")
        return _failure(http, error.status_code, code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(InternalError)
    @app.exception_handler(Exception)
    async def internal_error(http: Request, error: Exception) -> Response:
        return _response(http, 500, problem_of(error))


def _not_ready() -> RefusalError:
    return RefusalError("the server is loading its adapters", "loading", 503)


def _failure(
    http: Request, status: int, code: str, message: str, headers: dict[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    return _response(http, status, error_body(code, message, status, param), headers)


def _response(http: Request, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    if http.url.path in PATHS:  # with OpenAI's status and code
        status = 400 if status in (413, 422) else status
        if body["error"]["code"] == "unknown_adapter":
            body = {"error": {**body["error"], "code": "model_not_found", "param": "model"}}
    return JSONResponse(body, status, headers)
