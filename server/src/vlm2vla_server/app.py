"""The HTTP API of protocol 1 (docs/protocol.md) as a FastAPI application; `/v1` is added by `openai_api`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from vlm2vla_schema import messages as wire
from vlm2vla_schema.errors import ErrorBody, ErrorCode
from vlm2vla_server import act, generation, openai_api, openpi
from vlm2vla_server.engines.base import Engine
from vlm2vla_server.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    ServerError,
    UnsupportedMediaType,
)
from vlm2vla_server.exchange import Handler, echo_id, handle
from vlm2vla_server.guard import Guard, error_answer
from vlm2vla_server.service import ServerInfo, Service
from vlm2vla_server.settings import Settings

GENERATING: tuple[tuple[str, type[Any], type[BaseModel], Handler[Any], bool], ...] = (
    ("/subtasks", wire.SubtasksRequest, wire.SubtasksResponse, generation.subtasks, False),
    ("/motion_plan", wire.MotionPlanRequest, wire.MotionPlanResponse, generation.motion_plan, False),
    ("/actions", wire.ActionsRequest, wire.ActionsResponse, generation.actions, True),
    ("/cycle", wire.CycleRequest, wire.CycleResponse, generation.cycle, True),
    ("/verify", wire.VerifyRequest, wire.VerifyResponse, generation.verify, False),
    ("/vqa", wire.VqaRequest, wire.VqaResponse, generation.vqa, False),
)
"""Path, request, answer, function, and whether it streams (and then: whether the newest of an episode wins)."""

PATHS = frozenset(
    {row[0] for row in GENERATING}
    | {"/healthz", "/readyz", "/info", "/metrics", "/docs", "/openapi.json", act.PATH}
    | openai_api.PATHS
)


class _Plain(APIRoute):
    """A route that stands in the document like any other, and whose function takes the request and makes the answer
    itself: FastAPI's own reading of parameters and bodies would find nothing to do, and takes its time to find out."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function as it is."""
        return self.endpoint


def create_app(settings: Settings, engine: Engine) -> ASGIApp:
    """The application over an engine that is not started yet: start-up runs beside serving, so that /healthz answers
    while the model loads."""
    return build_app(Service(settings, engine))


def build_app(service: Service) -> ASGIApp:
    """The application of a service that is not started yet."""
    return Guard(
        build_api(service),
        api_key=service.settings.api_key,
        metrics=service.metrics,
        paths=PATHS,
        max_body_bytes=service.settings.max_body_bytes,
        sockets=frozenset({openpi.PATH}) if openpi.installed() else frozenset(),
    )


def build_api(service: Service) -> FastAPI:
    """Routes and error handlers, without the guard around them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await service.close()

    api = FastAPI(
        title="vlm2vla-server",
        summary="A vision-language model served as a robot policy that speaks",
        version=str(wire.PROTOCOL),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_error_handlers(api)
    for path, request_model, answer_model, handler, streams in GENERATING:
        _add_generating(api, service, path, request_model, answer_model, handler, streams)
    _add_plain(api, service)
    openai_api.add_routes(api, service)
    act.add_route(api, service, _error_responses())
    api.add_api_websocket_route(openpi.PATH, openpi.Door(service).serve)
    return api


def _add_generating(
    api: FastAPI,
    service: Service,
    path: str,
    request_model: type[Any],
    answer_model: type[BaseModel],
    handler: Handler[Any],
    streams: bool,
) -> None:
    async def endpoint(request: Request) -> Response:
        return await handle(service, request, request_model, handler, streams=streams, exclusive=streams)

    schema = {"schema": request_model.model_json_schema()}
    api.router.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        name=path.strip("/"),
        summary=(handler.__doc__ or "").split("\n")[0],
        response_model=None,
        route_class_override=_Plain,
        responses={200: {"model": answer_model}, **_error_responses()},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": schema, "multipart/form-data": schema}}
        },
    )


def _error_responses(*which: ErrorCode) -> dict[int | str, dict[str, Any]]:
    codes: dict[int, list[str]] = {}
    for code in which or ErrorCode:
        codes.setdefault(code.http_status, []).append(code.value)
    return {status: {"model": ErrorBody, "description": ", ".join(names)} for status, names in codes.items()}


def _add_plain(api: FastAPI, service: Service) -> None:
    failures = _error_responses(ErrorCode.UNAUTHORIZED, ErrorCode.ENGINE_FAILURE)
    not_ready = _error_responses(ErrorCode.NOT_READY)

    @api.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", summary="Weights loaded, warmed up, adapters proven active", responses=not_ready)
    async def readyz() -> dict[str, str | None]:
        service.require_ready()
        return {"status": "ready", "reason": service.reason}

    @api.get("/info", summary="Protocol, models, limits, units, versions", responses=failures)
    async def info() -> ServerInfo:
        return service.info()

    @api.get("/metrics", summary="Prometheus", response_class=Response, responses=failures)
    async def metrics() -> Response:
        text = service.metrics.exposition(service.engine.load())
        return Response(text, media_type=service.metrics.content_type)


def _add_error_handlers(api: FastAPI) -> None:
    async def ours(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, ServerError)
        status, body = error_answer(problem, request.url.path, echo_id(request.scope))
        return Response(body, status_code=status, media_type="application/json", headers=problem.headers)

    async def frameworks(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        return await ours(request, _translate(request, problem))

    api.add_exception_handler(ServerError, ours)
    api.add_exception_handler(HTTPException, frameworks)


def _translate(request: Request, problem: HTTPException) -> ServerError:
    if problem.status_code == 404:
        return NotFound("no such path; GET /docs lists all", details={"paths": sorted(PATHS)})
    if problem.status_code == 405:
        return MethodNotAllowed("this path does not take this method", headers=dict(problem.headers or {}))
    if problem.status_code == 413:
        return PayloadTooLarge("the body is too large")
    if problem.status_code == 415:
        return UnsupportedMediaType("expected application/json or multipart/form-data")
    return InvalidRequest("the request cannot be read")


__all__ = ["build_api", "build_app", "create_app"]
