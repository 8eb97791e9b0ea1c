"""The outermost ASGI layer: API key, request ids, metrics, and one error shape for everything.

Whatever happens below it, a caller gets `{"error": {...}}` with a documented code, never a traceback, and never an
answer of the framework's own making.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence

from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm2vla_schema.errors import ErrorBody, ErrorCode, ErrorInfo
from vlm2vla_server import logs
from vlm2vla_server.errors import EngineFailure, ServerError, Unauthorized
from vlm2vla_server.metrics import Metrics

log = logging.getLogger("vlm2vla_server")

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
RECEIVED_KEY = "vlm2vla.received_s"
REQUEST_ID_KEY = "vlm2vla.request_id"
LOG_KEY = "vlm2vla.log"
"""A dict that lower layers add to; its members stand in the request's line of the log."""
QUIET_PATHS = OPEN_PATHS | {"/metrics"}
DRAIN_TIMEOUT_S = 2.0
DRAIN_FACTOR = 4


def error_body(problem: ServerError, request_id: str | None) -> bytes:
    """The wire form of an error."""
    info = ErrorInfo(code=problem.code, message=problem.message, details=problem.details, request_id=request_id)
    try:
        return ErrorBody(error=info).model_dump_json().encode()
    except ValueError:  # model text that is not Unicode: kept readable by escapes
        return json.dumps({"error": info.model_dump(mode="python")}, default=str).encode()


class OpenAIError(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str


class OpenAIErrorBody(BaseModel):
    """The body of every answer of /v1 that is not a success."""

    error: OpenAIError


def openai_status(code: ErrorCode) -> int:
    """The HTTP status of a code under /v1: OpenAI answers 400 to an invalid request."""
    return 400 if code is ErrorCode.INVALID_REQUEST else code.http_status


def openai_error_body(problem: ServerError) -> bytes:
    """The wire form of an error under /v1, on one line."""
    kind = "invalid_request_error" if problem.code.http_status < 499 else "server_error"
    code = problem.openai_code or problem.code.value
    return OpenAIErrorBody(error=OpenAIError(message=problem.message, type=kind, code=code)).model_dump_json().encode()


def error_answer(problem: ServerError, path: str, request_id: str | None) -> tuple[int, bytes]:
    """Status and body of an error, in the shape of the path that was asked."""
    if path == "/v1" or path.startswith("/v1/"):
        return openai_status(problem.code), openai_error_body(problem)
    return problem.code.http_status, error_body(problem, request_id)


class Guard:
    """Wraps the app. `paths` are the known paths, used as metric labels; anything else counts as "other". `sockets`:
    the paths where a websocket is spoken."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        metrics: Metrics,
        paths: frozenset[str],
        max_body_bytes: int,
        sockets: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._metrics = metrics
        self._paths = paths
        self._sockets = sockets
        self._drain_bytes = DRAIN_FACTOR * max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._on_socket(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._drain_bytes, scope["path"])
        received_s = time.monotonic()
        scope[RECEIVED_KEY] = received_s
        scope[REQUEST_ID_KEY] = exchange.request_id
        scope[LOG_KEY] = {}
        logs.REQUEST_ID.set(exchange.request_id)
        try:
            if not self._authorized(scope):
                exchange.drains = False
                raise Unauthorized(
                    "expected the header 'Authorization: Bearer KEY' with this server's API key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            await self._app(scope, exchange.receive, exchange.send)
            await asyncio.sleep(0)  # uvloop sends at the end of its round: the answer goes, then the log's line is made
        except ServerError as problem:
            await exchange.fail(problem)
        except Exception:
            log.exception("request %s failed", exchange.request_id)
            await exchange.fail(EngineFailure("the server failed on this request; its log says why"))
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            took_s = time.monotonic() - received_s
            self._metrics.requests.labels(path, str(exchange.status or 499)).inc()
            self._metrics.seconds.labels(path).observe(took_s)
            _log_request(scope, path, exchange.status or 499, took_s)

    async def _on_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A websocket. Refused before it opens: another path, a wrong key, a page in a browser, whose script could
        reach a server on its user's machine without asking (no robot's client sends Origin)."""
        from_page = any(name == b"origin" for name, _ in scope["headers"])
        if scope["path"] not in self._sockets or from_page or not self._authorized(scope, (b"bearer", b"api-key")):
            await send({"type": "websocket.close", "code": 1008})
            return
        logs.REQUEST_ID.set(uuid.uuid4().hex)
        try:
            await self._app(scope, receive, send)
        except Exception:
            log.exception("a websocket failed")

    def _authorized(self, scope: Scope, schemes: Sequence[bytes] = (b"bearer",)) -> bool:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return True
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        return bool(scheme.lower() in schemes and hmac.compare_digest(key.strip(), self._key))


def _log_request(scope: Scope, path: str, status: int, took_s: float) -> None:
    # Probes come every few seconds and say nothing while they succeed.
    level = logging.DEBUG if path in QUIET_PATHS and status == 200 else logging.INFO
    line = logs.fields(method=scope["method"], path=path, status=status, ms=round(took_s * 1000, 1), **scope[LOG_KEY])
    log.log(level, "request", extra=line)


class _Exchange:
    """One request's two directions, watched: was the body read, has the answer begun, with which status."""

    def __init__(self, receive: Receive, send: Send, drain_bytes: int, path: str) -> None:
        self._receive = receive
        self._send = send
        self._path = path
        self._drain_bytes = drain_bytes
        self._body_done = False
        self.drains = True
        self.status: int | None = None
        self.request_id = uuid.uuid4().hex

    async def receive(self) -> Message:
        """Hand a message down."""
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._body_done = True
        return message

    async def send(self, message: Message) -> None:
        """Hand a message up; an error waits until the caller has finished sending, so that it gets to read it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if message["status"] >= 400 and self.drains:
                await self._drain()
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def fail(self, problem: ServerError) -> None:
        """Answer with an error, unless an answer has begun already."""
        if self.status is not None:
            return
        status, body = error_answer(problem, self._path, self.request_id)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def _drain(self) -> None:
        taken = 0
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while not self._body_done and taken < self._drain_bytes:
                    message = await self.receive()
                    taken += len(message.get("body", b""))
        except TimeoutError:
            return
