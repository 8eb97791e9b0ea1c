"""One generating request over HTTP: admission, the task that does the work, its cancellation, its answer or stream.

The work runs in a task of its own, so that a caller who leaves, or a newer request of the same episode, can stop it
at any moment; stopping it frees the engine within one token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vlm2vla_schema import messages as wire
from vlm2vla_schema.errors import ErrorInfo
from vlm2vla_server.admission import Ticket, priority_of
from vlm2vla_server.bodies import parse_body, read_body
from vlm2vla_server.errors import Cancelled, DeadlineExceeded, EngineFailure, ServerError
from vlm2vla_server.generation import Call
from vlm2vla_server.guard import LOG_KEY, RECEIVED_KEY, REQUEST_ID_KEY
from vlm2vla_server.policy import Clocking
from vlm2vla_server.service import Service

log = logging.getLogger("vlm2vla_server")

R = TypeVar("R", bound=wire.GenerationFields)
Handler = Callable[[R, Call], Awaitable[wire.StageResult]]
NDJSON = "application/x-ndjson"
SUPERSEDE_TIMEOUT_S = 2.0
SEND_TIMEOUT_S = 10.0


class Work:
    """The running request: `events` receives plan and row events, then the answer or the error, which is the last."""

    def __init__(
        self, task: asyncio.Task[None], events: asyncio.Queue[BaseModel | ServerError], leave: asyncio.Task[None]
    ) -> None:
        self.task = task
        self.events = events
        self._leave = leave

    async def next(self) -> BaseModel | ServerError:
        """The next event."""
        return await self.events.get()

    def release(self) -> None:
        """The answer is there: nobody has to watch any more whether the caller leaves. Waits for nothing."""
        self._leave.cancel()

    async def stop(self) -> None:
        """Cancel whatever still runs, and wait for it."""
        for task in (self.task, self._leave):
            task.cancel()
        await asyncio.gather(self.task, self._leave, return_exceptions=True)


async def handle(
    service: Service, request: Request, model: type[R], handler: Handler[R], *, streams: bool, exclusive: bool
) -> Response:
    """Serve one request. streams: the endpoint can answer as NDJSON. exclusive: newest of its episode wins."""
    with service.admission.reading():
        body = await read_body(request, service.settings.max_body_bytes, service.settings.body_timeout_s)
        parsed = await parse_body(request.headers, body, model)
        del body
    if parsed.request_id is not None:
        request.scope["vlm2vla.echo_id"] = parsed.request_id
    named = {"caller_request_id": parsed.request_id, "episode_id": parsed.episode_id, "frame_id": parsed.frame_id}
    request.scope[LOG_KEY] |= {name: value for name, value in named.items() if value is not None}
    request.scope[LOG_KEY]["model"] = service.label(parsed.model, request.url.path)
    service.require_ready()
    wants_stream = streams and NDJSON in request.headers.get("accept", "").lower()
    work = begin(
        service,
        request,
        lambda call: handler(parsed, call),
        deadline_ms=parsed.deadline_ms,
        episode=parsed.episode_id if exclusive else None,
        stream=wants_stream,
    )
    first = await first_event(work)
    if wants_stream:
        return EventStream(work, first, NDJSON, lambda event: _line(event, echo_id(request.scope)))
    work.release()
    return Response(first.model_dump_json(), media_type="application/json")


def echo_id(scope: Scope) -> str:
    """The caller's request id, or the server's own for this request."""
    return str(scope.get("vlm2vla.echo_id") or scope[REQUEST_ID_KEY])


async def first_event(work: Work) -> BaseModel:
    """The first event, so that an error before it is an ordinary HTTP error. Raises ServerError."""
    try:
        first = await work.next()
    except asyncio.CancelledError:
        await work.stop()
        raise
    if isinstance(first, ServerError):
        await work.stop()
        raise first
    return first


def begin(
    service: Service,
    request: Request,
    job: Callable[[Call], Awaitable[BaseModel]],
    *,
    deadline_ms: int,
    episode: str | None,
    stream: bool,
) -> Work:
    """Start the work of a request. episode: the newest request of the same one wins. stream: events are wanted."""
    received_s: float = request.scope[RECEIVED_KEY]
    events: asyncio.Queue[BaseModel | ServerError] = asyncio.Queue()
    clocking = Clocking(received_s, received_s + deadline_ms / 1000.0)
    call = Call(service, clocking, events.put if stream else None)
    ticket = _ticket(request, clocking)
    left = asyncio.Event()

    async def run() -> None:
        outcome = await outcome_of(service, ticket, episode, left, lambda: job(call))
        _note(request.scope, outcome)
        events.put_nowait(outcome)

    def unblock(finished: asyncio.Task[None]) -> None:
        if finished.cancelled():  # stopped from outside, or before its first step: nobody may wait for it for ever
            events.put_nowait(Cancelled("the request was stopped"))

    task = asyncio.create_task(run())
    task.add_done_callback(unblock)
    ticket.attach(task)
    return Work(task, events, asyncio.create_task(_watch(request.receive, task, left)))


def _ticket(request: Request, clocking: Clocking) -> Ticket:
    """The request's place in the queue. Requests of one robot are those of its episode, or of its address."""
    known = request.scope[LOG_KEY]
    address = request.client.host if request.client is not None else ""
    robot = str(known.get("episode_id") or address)
    model = str(known.get("model", "unknown"))
    return Ticket(clocking.began_s, clocking, priority_of(request.url.path), robot, model)


def _note(scope: Scope, outcome: BaseModel | ServerError) -> None:
    """What the log's line of this request says about its work."""
    if isinstance(outcome, ServerError):
        scope[LOG_KEY]["code"] = outcome.code.value
    elif isinstance(outcome, wire.StageResult):
        scope[LOG_KEY] |= {
            "attempts": outcome.attempts,
            "completion_tokens": outcome.usage.completion_tokens,
            "queue_ms": round(outcome.timing_ms.queue, 1),
            "generate_ms": round(outcome.timing_ms.generate, 1),
        }


async def _watch(receive: Receive, task: asyncio.Task[None], left: asyncio.Event) -> None:
    """Cancel the work as soon as the caller is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    left.set()
    task.cancel()


async def outcome_of(
    service: Service,
    ticket: Ticket,
    episode: str | None,
    left: asyncio.Event,
    work: Callable[[], Awaitable[BaseModel]],
) -> BaseModel | ServerError:
    """Run the work to its answer or its error; every way to fail ends in one of ours."""
    try:
        older = service.episodes.enter(episode, ticket)
        if older is not None:
            # Its engine slot is free within a token; then there is room for this one even on a full server.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(older.finished.wait(), SUPERSEDE_TIMEOUT_S)
        async with service.admission.generating(ticket):
            return await work()
    except ServerError as problem:
        return problem
    except TimeoutError:
        return DeadlineExceeded("the deadline passed", details={"attempts": []})
    except asyncio.CancelledError:
        service.metrics.cancelled.labels(ticket.reason or "disconnected", ticket.model).inc()
        if ticket.problem is not None:
            return ticket.problem
        if left.is_set():
            return Cancelled("the caller left")
        raise
    except Exception:
        log.exception("a generating request failed")
        return EngineFailure("the server failed on this request; its log says why")
    finally:
        service.episodes.leave(episode, ticket)


class EventStream(Response):
    """Events as they come. encode: an event's bytes, and whether it is the stream's last."""

    def __init__(
        self,
        work: Work,
        first: BaseModel,
        media_type: str,
        encode: Callable[[BaseModel | ServerError], tuple[bytes, bool]],
    ) -> None:
        super().__init__(media_type=media_type)
        self._work = work
        self._first = first
        self._encode = encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events as they come; a caller that does not read for SEND_TIMEOUT_S is dropped."""
        kind = str(self.media_type).encode()
        headers = [(b"content-type", kind), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            event: BaseModel | ServerError = self._first
            while True:
                data, last = self._encode(event)
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": data, "more_body": not last})
                if last:
                    return
                event = await self._work.next()
        except (TimeoutError, OSError):
            log.info("a streaming caller stopped reading")
        finally:
            await self._work.stop()


def _line(event: BaseModel | ServerError, request_id: str) -> tuple[bytes, bool]:
    """One line of NDJSON; exactly one `done` or `error` ends a stream."""
    if isinstance(event, ServerError):
        info = ErrorInfo(code=event.code, message=event.message, details=event.details, request_id=request_id)
        return wire.ErrorEvent(error=info).model_dump_json().encode() + b"\n", True
    if isinstance(event, wire.PlanEvent | wire.RowEvent):
        return event.model_dump_json().encode() + b"\n", False
    return b'{"event":"done",' + event.model_dump_json().encode()[1:] + b"\n", True
