"""The engine over HTTP: classify, generate, adapters, health and metrics, with one form for every error."""

# No postponed annotations here: FastAPI reads those of functions within a function where they stand.

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from lora_hf.adapters.format import CONFIG_FILE, WEIGHTS_FILE
from lora_hf.core.errors import UserError
from lora_hf.core.records import RUN_CONFIG_FILE
from lora_hf.models.model_ids import base_name
from lora_hf.serving.engine import CHUNK, Engine
from lora_hf.serving.gate import Gate, problem
from lora_hf.serving.limits import RefusalError
from lora_hf.serving.metrics import Metrics
from lora_hf.serving.playground import PATH, mount
from lora_hf.serving.quick import Quick
from lora_hf.serving.requests import Version, late
from lora_hf.serving.schema import Adapter, Adapters, ClassifyAnswer, Failure, GenerateAnswer, Load, bodies

STATUS = {
    "unknown_adapter": 404,
    "wrong_kind": 400,
    "bad_input": 422,
    "too_large": 413,
    "queue_full": 503,
    "closing": 503,
    "deadline_passed": 504,
}
WORDS = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
BOUNDS = ("too_long", "string_too_long", "less_than_equal")  # what pydantic calls a value above a limit
CLASSIFY = "/v1/classify"
SOON = 0.2  # seconds: only for an answer that takes longer is it worth asking whether its client is still there
EXAMPLE = "send a JSON object with the header 'content-type: application/json'; /docs shows examples"


class ProblemError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclass
class ServerState:
    """Who may come in, and whether the server is open.

    Attributes:
        token: what every request must bring, where it is set.
        folder: adapters may be loaded from below it over HTTP; None: not at all.
    """

    token: str | None = None
    folder: Path | None = None
    open: bool = False
    draining: bool = False


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(
    engine: Engine, door: ServerState, metrics: Metrics, lifespan: Lifespan | None = None, playground: bool = False
) -> FastAPI:
    """The whole application; `engine` may still be loading, `door.open` says when it is not."""
    app = FastAPIOffline(
        redoc_url=None,
        title="lora_hf",
        description="Many LoRA adapters on one base. Every error is `{error: {code, message}}`.",
        lifespan=lifespan,
        responses={
            status: {"model": Failure} for status in (400, 401, 403, 404, 405, 413, 415, 422, 500, 503, 504)
        },
    )  # fmt: skip
    metrics.watch(engine.waiting, lambda: len(engine.adapters()))
    login = PATH if playground else None
    ClassifyBody, GenerateBody = bodies(engine.limits)

    async def classify(asked: Any, receive: Any) -> Any:
        return await _classified(engine, asked, receive)

    app.add_middleware(Quick, path=CLASSIFY, model=ClassifyBody, answer=classify, told=lambda error: _told(error, door))
    app.add_middleware(Gate, token=door.token, max_bytes=engine.limits.max_bytes, metrics=metrics, own_login=login)
    _errors(app, door)
    _answers(app, engine, ClassifyBody, GenerateBody)
    _adapters(app, engine, door)
    _health(app, door, metrics)

    @app.get("/", include_in_schema=False)
    async def front() -> Response:
        return RedirectResponse(PATH if playground else "/docs")

    if playground:
        mount(app, engine, door.token)
    return app


def _answers(app: FastAPI, engine: Engine, ClassifyBody: Any, GenerateBody: Any) -> None:
    @app.post(CLASSIFY, response_model=ClassifyAnswer)
    async def classify(http: Request, body: ClassifyBody) -> Any:  # type: ignore[valid-type]
        """Labels and probabilities of texts, or of pairs of texts."""
        return _json(await _classified(engine, body, http.receive))

    @app.post(
        "/v1/generate",
        response_model=GenerateAnswer,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def generate(http: Request, body: GenerateBody) -> Any:  # type: ignore[valid-type]
        """A text for a prompt; with `stream` piece by piece."""
        values = body.model_dump(exclude_none=True)  # type: ignore[attr-defined]
        stream, deadline = values.pop("stream"), values.pop("deadline", None)
        adapter, prompt = values.pop("adapter"), values.pop("prompt")
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        request = engine.submit_generate(adapter, prompt, values, deadline, on_text=tell if stream else None)
        if not stream:
            return _json(asdict(await _answered(http.receive, request)))
        request.future.add_done_callback(lambda _: tell(None))
        return StreamingResponse(
            _events(request, pieces), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )


async def _classified(engine: Engine, asked: Any, receive: Any) -> dict[str, Any]:
    size = sum(len(part) for part in asked.inputs if isinstance(part, str))
    ask = (engine.submit_classify, asked.adapter, asked.inputs, asked.deadline)
    # A few texts are tokenised in less time than it takes to hand them to another thread.
    short = size <= CHUNK and all(isinstance(part, str) for part in asked.inputs)
    answer = await _answered(receive, ask[0](*ask[1:]) if short else await run_in_threadpool(*ask))
    return {"adapter": answer.adapter, "version": answer.version, "answers": answer.answers}


async def _answered(receive: Any, request: Any) -> Any:
    """The answer of a request; where its client goes away while it waits, it is dropped before it costs a batch."""
    future: Any = asyncio.wrap_future(request.future)
    gone = None
    try:
        await asyncio.wait([future], timeout=min(SOON, max(0.0, request.deadline - time.monotonic())))
        if not future.done():
            gone = asyncio.ensure_future(receive())
            seconds = max(0.0, request.deadline - time.monotonic())
            await asyncio.wait({future, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        raise late()
    finally:
        if gone is not None:
            gone.cancel()
        future.cancel()


async def _events(request: Any, pieces: "asyncio.Queue[str | None]") -> AsyncIterator[bytes]:
    try:
        while True:
            seconds = max(0.0, request.deadline - time.monotonic())
            try:
                piece = await asyncio.wait_for(pieces.get(), seconds)
            except asyncio.TimeoutError:
                yield _event("error", json.loads(problem("deadline_passed", str(late()))))
                return
            if piece is not None:
                yield _event("text", {"text": piece})
                continue
            error = None if request.future.cancelled() else request.future.exception()
            if isinstance(error, RefusalError):
                yield _event("error", json.loads(problem(error.code, str(error))))
            elif error is not None:
                yield _event("error", json.loads(problem("internal", "the server failed at this request")))
            elif not request.future.cancelled():
                yield _event("done", asdict(request.future.result()))
            return
    finally:
        request.future.cancel()  # of a client that went away: the text is not written to its end


def _event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _adapters(app: FastAPI, engine: Engine, door: ServerState) -> None:
    @app.get("/v1/adapters", response_model=Adapters)
    async def adapters() -> Any:
        """What is served."""
        return {"adapters": [_described(version) for version in engine.adapters()]}

    @app.put("/v1/adapters/{name}", response_model=Adapter)
    async def load(name: str, body: Load) -> Any:
        """Loads an adapter, or replaces the one of that name, while others answer."""
        folder = _below(door, body.folder)
        try:
            return _described(await run_in_threadpool(engine.load, name, folder, None, False))
        except RefusalError:
            raise
        except UserError as error:
            # The message names the folder; where the server keeps it is not the client's to know.
            message = str(error).replace(str(folder), body.folder).replace(str(_root(door)), ".")
            raise ProblemError(422, "bad_adapter", message) from error

    @app.delete("/v1/adapters/{name}", response_model=Adapter)
    async def remove(name: str) -> Any:
        """Removes an adapter; what was accepted for it is still answered."""
        _root(door)
        return _described(await run_in_threadpool(engine.remove, name))


def _described(version: Version) -> Adapter:
    task = version.saved.task
    return Adapter(
        name=version.name,
        version=version.digest,
        base=base_name(version.saved.model.name)
        if Path(version.saved.model.name).is_dir()
        else version.saved.model.name,
        task=task.name,
        kind=version.kind,
        labels=list(task.label_names),
        reads=list(task.text_columns) if task.label_names or task.problem_type else ["prompt"],
    )


def _root(door: ServerState) -> Path:
    if door.folder is None:
        message = "this server's adapters are fixed; it was started without --allow-loading"
        raise ProblemError(403, "loading_off", message)
    return door.folder.resolve()


def _below(door: ServerState, folder: str) -> Path:
    """The folder that a client names, if it and its files lie below the one allowed, whatever links say."""
    root = _root(door)
    refused = ProblemError(403, "outside", f"{folder!r} is no folder below that of --allow-loading")
    if "\0" in folder or "\\" in folder or Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise refused
    try:
        found = (root / folder).resolve()
        places = [found, *(found / name for name in (CONFIG_FILE, WEIGHTS_FILE, RUN_CONFIG_FILE))]
        inside = found != root and all(place.resolve().is_relative_to(root) for place in places)
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not inside or not found.is_dir():
        raise refused
    return found


def _health(app: FastAPI, door: ServerState, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """Whether it takes requests: 503 while it loads, and from SIGTERM on."""
        if door.draining or not door.open:
            word = "closing" if door.draining else "loading"
            raise ProblemError(503, word, f"the server is {word}", {"retry-after": "1"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def page() -> Response:
        """For Prometheus."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")


def _told(error: UserError, door: ServerState) -> Response:
    if not isinstance(error, RefusalError):
        return _failure(500, "broken_adapter", str(error))
    if error.code == "unknown_adapter" and not door.open:
        return _failure(503, "loading", "the server is loading its adapters", {"retry-after": "1"})
    status = STATUS.get(error.code, 400)
    after = {"retry-after": str(getattr(error, "retry_after", 1))} if status == 503 else {}
    return _failure(status, error.code, str(error), after)


def _errors(app: FastAPI, door: ServerState) -> None:
    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        return _told(error, door)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        first = found[0]
        if first["type"] == "json_invalid":
            reason = f"{first.get('ctx', {}).get('error', 'not JSON')} at character {first['loc'][-1]}"
            return _failure(400, "malformed_json", f"the body is not JSON: {reason}; {EXAMPLE}")
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if http.method in ("POST", "PUT") and kind != "application/json":
            return _failure(415, "unsupported_media_type", f"the body's content-type is {kind!r}; {EXAMPLE}")
        problems = "; ".join(f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in found[:5])
        over = all(each["type"] in BOUNDS for each in found)
        return _failure(413 if over else 422, "too_large" if over else "invalid_request", problems)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code = WORDS.get(error.status_code, "refused")
        return _failure(error.status_code, code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(ProblemError)
    async def told(_: Request, error: ProblemError) -> Response:
        return _failure(error.status, error.code, str(error), error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _failure(500, "internal", "the server failed at this request; its log says why")


def _failure(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)
