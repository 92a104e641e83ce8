"""The engine over HTTP: classify, generate, adapters, health and metrics. Every error has the same form."""

# No `from __future__ import annotations`: FastAPI evaluates the annotations of functions nested in functions.

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from lora_hf.core.errors import UserError
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.models.model_ids import base_name
from lora_hf.serving.engine import CHUNK, Engine
from lora_hf.serving.limits import ClosingError, DeadlinePassedError, RefusalError, UnknownAdapterError, error_body
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.middleware import JSON, AccessMiddleware, FastPathMiddleware
from lora_hf.serving.requests import AdapterVersion
from lora_hf.serving.schema import Adapter, Adapters, ClassifyAnswer, Failure, GenerateAnswer, Load, bodies

HTTP_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
LIMIT_ERRORS = ("too_long", "string_too_long", "less_than_equal")  # pydantic's types for a value above a limit
CLASSIFY, PLAYGROUND = "/v1/classify", "/playground"
DISCONNECT_CHECK = 0.2  # seconds: asking whether the client is still there costs more than a faster answer
BROKEN_ADAPTER = "broken_adapter"
INTERNAL_ERROR = "the server failed to answer this request; see its log"
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


def build_app(
    engine: Engine, state: ServerState, metrics: Metrics, lifespan: Lifespan | None = None, playground: bool = False
) -> FastAPI:
    """Builds the application; `engine` may still be loading adapters until `state.ready` is set."""
    errors = (400, 401, 403, 404, 405, 413, 415, 422, 431, 500, 503, 504)
    app = FastAPIOffline(
        redoc_url=None,
        title="lora_hf",
        description="Many LoRA adapters on one base. Every error is `{error: {code, message}}`.",
        lifespan=lifespan,
        responses={status: {"model": Failure} for status in errors},
    )
    ClassifyBody, GenerateBody = bodies(engine.limits)

    app.add_middleware(
        FastPathMiddleware,
        path=CLASSIFY,
        model=ClassifyBody,
        answer=partial(_classify, engine),
        error_response=partial(_error_response, state),
    )
    app.add_middleware(
        AccessMiddleware,
        token=state.token,
        limits=engine.limits,
        metrics=metrics,
        hosts=state.hosts,
        playground=PLAYGROUND if playground else None,
    )
    _add_error_handlers(app, state)
    _add_inference(app, engine, ClassifyBody, GenerateBody)
    _add_adapters(app, engine, state)
    _add_health(app, engine, state, metrics)

    @app.get("/", include_in_schema=False)
    async def front() -> Response:
        return RedirectResponse(PLAYGROUND if playground else "/docs")

    if playground:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it on import
        from lora_hf.serving.playground import mount

        mount(app, engine, state.token, PLAYGROUND)
    return app


def _add_inference(app: FastAPI, engine: Engine, ClassifyBody: Any, GenerateBody: Any) -> None:
    @app.post(CLASSIFY, response_model=ClassifyAnswer)
    async def classify(http: Request, body: ClassifyBody) -> Any:  # type: ignore[valid-type]
        """Classifies texts, or pairs of texts: a label and the probability of each, or a score for regression."""
        return JSONResponse(await _classify(engine, body, http.receive))

    @app.post(
        "/v1/generate",
        response_model=GenerateAnswer,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def generate(http: Request, body: GenerateBody) -> Any:  # type: ignore[valid-type]
        """Generates a text for a prompt; `stream` sends it piece by piece."""
        decoding = body.model_dump(exclude_none=True)  # type: ignore[attr-defined]
        stream, deadline = decoding.pop("stream"), decoding.pop("deadline", None)
        adapter, prompt = decoding.pop("adapter"), decoding.pop("prompt")
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        request = engine.submit_generate(adapter, prompt, decoding, deadline, on_text=put if stream else None)
        if not stream:
            return JSONResponse(asdict(await _result(http.receive, request)))
        request.future.add_done_callback(lambda _: put(None))
        return StreamingResponse(
            _events(request, pieces), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )


async def _classify(engine: Engine, body: Any, receive: Any) -> dict[str, Any]:
    arguments = (body.adapter, body.inputs, body.deadline)
    # Tokenizing a few texts takes less time than handing them to another thread.
    short = all(isinstance(text, str) for text in body.inputs) and sum(map(len, body.inputs)) <= CHUNK
    submit = engine.submit_classify
    request = submit(*arguments) if short else await run_in_threadpool(submit, *arguments)
    result = await _result(receive, request)
    answer = {"adapter": result.adapter, "version": result.version, "answers": result.answers}
    return {**answer, "truncated": result.truncated}


async def _result(receive: Any, request: Any) -> Any:
    """The result of a request, which is dropped if its client disconnects or its deadline passes."""
    future: Any = asyncio.wrap_future(request.future)
    disconnect = None
    try:
        await asyncio.wait([future], timeout=min(DISCONNECT_CHECK, _seconds_left(request)))
        if not future.done():
            disconnect = asyncio.ensure_future(receive())
            timeout = _seconds_left(request)
            await asyncio.wait({future, disconnect}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        raise DeadlinePassedError
    finally:
        if disconnect is not None:
            disconnect.cancel()
        future.cancel()


def _seconds_left(request: Any) -> float:
    return max(0.0, request.deadline - time.monotonic())


async def _events(request: Any, pieces: "asyncio.Queue[str | None]") -> AsyncIterator[bytes]:
    """The server-sent events of a streamed text; None in `pieces` ends it."""
    try:
        while (piece := await asyncio.wait_for(pieces.get(), _seconds_left(request))) is not None:
            yield _event("text", {"text": piece})
        if not request.future.cancelled():
            yield _event("done", asdict(request.future.result()))
    except (asyncio.TimeoutError, UserError) as reason:
        error = reason if isinstance(reason, UserError) else DeadlinePassedError()
        yield _event("error", error_body(getattr(error, "code", BROKEN_ADAPTER), str(error)))
    except Exception:  # noqa: BLE001 - the worker has logged it
        yield _event("error", error_body("internal", INTERNAL_ERROR))
    finally:
        request.future.cancel()  # stops generating if the client is gone


def _event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def _add_adapters(app: FastAPI, engine: Engine, state: ServerState) -> None:
    @app.get("/v1/adapters", response_model=Adapters)
    async def adapters() -> Any:
        """Lists the adapters served."""
        return {"adapters": [_describe(version) for version in engine.adapters()]}

    @app.put("/v1/adapters/{name}", response_model=Adapter)
    async def load(name: str, body: Load) -> Any:
        """Loads an adapter, or replaces the one of that name, without interrupting the others."""
        folder = _resolve_below_root(state, body.folder)
        try:
            return _describe(await run_in_threadpool(engine.load, name, folder, None, False))
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
        return _describe(await run_in_threadpool(engine.remove, name))


def _describe(version: AdapterVersion) -> Adapter:
    task, base = version.saved.task, version.saved.model.name
    return Adapter(
        name=version.name,
        version=version.digest,
        base=base_name(base) if Path(base).is_dir() else base,
        task=task.name,
        kind=version.kind,
        labels=list(task.label_names),
        reads=list(task.text_columns) if task.verb == "predict" else ["prompt"],
    )


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


def _add_health(app: FastAPI, engine: Engine, state: ServerState, metrics: Metrics) -> None:
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
        page = metrics.page(engine.waiting(), len(engine.adapters()))
        return Response(page, media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI, state: ServerState) -> None:
    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        return _error_response(state, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        problems = error.errors()
        first = problems[0]
        if first["type"] == "json_invalid":
            reason = f"{first.get('ctx', {}).get('error', 'not JSON')} at character {first['loc'][-1]}"
            return _failure(400, "malformed_json", f"the body is not JSON: {reason}; {JSON_HINT}")
        content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if http.method in ("POST", "PUT") and content_type != JSON:
            message = f"the body's content-type is {content_type!r}; {JSON_HINT}"
            return _failure(415, "unsupported_media_type", message)
        message = "; ".join(f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in problems[:5])
        if all(each["type"] in LIMIT_ERRORS for each in problems):
            return _failure(413, "too_large", message)
        return _failure(422, "invalid_request", message)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code = HTTP_CODES.get(error.status_code, "refused")
        return _failure(error.status_code, code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def internal_error(_: Request, error: Exception) -> Response:
        return _failure(500, "internal", INTERNAL_ERROR)


def _error_response(state: ServerState, error: UserError) -> Response:
    if not isinstance(error, RefusalError):
        return _failure(500, BROKEN_ADAPTER, str(error))
    if isinstance(error, UnknownAdapterError) and not state.ready:
        error = _not_ready()
    headers = {"retry-after": str(error.retry_after)} if error.status == 503 else None
    return _failure(error.status, error.code, str(error), headers)


def _not_ready() -> RefusalError:
    return RefusalError("the server is loading its adapters", "loading", 503)


def _failure(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(code, message), status, headers)
