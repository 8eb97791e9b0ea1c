"""POST /act: OpenVLA's protocol, so that its clients drive our policy.

Wire format (github.com/openvla/openvla, vla-scripts/deploy.py): {image, instruction, unnorm_key} with the image as
json-numpy's object gives an array [7] in the same form; {"encoded": the same as text} gives a text of it. OpenVLA's
server answers a failure with HTTP 200 and "error"; ours with an error of protocol 1, as everywhere. `unnorm_key` is
read and changes nothing: our rows are metres.

The protocol knows no episode, and rows of one must never move the arm in another. So every picture gets the first row
of a new chunk. A caller who adds `episode_id` (OpenVLA's server ignores it) is given the rest of the chunk too, row by
row, before the next picture is looked at: that is how the model was trained to move.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from vlm2vla_schema import messages as wire
from vlm2vla_schema.arrays import PIXELS, from_json, to_json
from vlm2vla_schema.errors import ArrayError
from vlm2vla_server.bodies import parse_body, parse_json, read_body
from vlm2vla_server.errors import InvalidImage, InvalidRequest
from vlm2vla_server.exchange import begin, first_event
from vlm2vla_server.generation import Call
from vlm2vla_server.guard import LOG_KEY
from vlm2vla_server.service import Service
from vlm2vla_server.whole import Motion, motion, picture

PATH = "/act"
MAX_EPISODES = 256
MAX_PAUSE_S = 10.0
"""A caller who was silent for longer is given no row of an older picture."""


class Array(BaseModel):
    """An array as json-numpy writes it: base64 of its bytes, numpy's name of its type, its lengths."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    data: str = Field(alias="__numpy__")
    dtype: Annotated[str, Field(max_length=8)]
    shape: Annotated[list[int], Field(max_length=3)]


class ActRequest(BaseModel):
    """OpenVLA's request: `image` and `instruction`, or `encoded`. Other fields are ignored, as its server does."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    image: Array | None = None
    instruction: wire.Text | None = None
    unnorm_key: Annotated[str, Field(max_length=200)] | None = None
    encoded: str | None = None
    episode_id: wire.EchoText | None = None


class Chunks:
    """Rows that wait for the next question of their episode and instruction."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._kept: OrderedDict[tuple[str, str], tuple[float, deque[list[float]]]] = OrderedDict()

    def keep(self, episode_id: str, instruction: str, rows: list[list[float]]) -> None:
        """Keep rows, at least one, in place of older ones; the episode that was silent longest makes room."""
        self._kept.pop((episode_id, instruction), None)
        self._kept[(episode_id, instruction)] = (self._now_s(), deque(rows))
        while len(self._kept) > MAX_EPISODES:
            self._kept.popitem(last=False)

    def take(self, episode_id: str, instruction: str) -> list[float] | None:
        """The next row; None when there is none or the caller was silent for too long."""
        asked_s, rows = self._kept.pop((episode_id, instruction), (0.0, deque[list[float]]()))
        if not rows or self._now_s() - asked_s > MAX_PAUSE_S:
            return None
        row = rows.popleft()
        if rows:
            self._kept[(episode_id, instruction)] = (self._now_s(), rows)
        return row


def add_route(api: FastAPI, service: Service, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add POST /act. responses: the errors, for the generated document."""

    chunks = Chunks()

    async def act(request: Request) -> Response:
        return await _act(service, chunks, request)

    api.add_api_route(
        PATH,
        act,
        methods=["POST"],
        summary="OpenVLA's protocol: a picture and an instruction in, one action of seven numbers out",
        response_model=None,
        responses={
            200: {"content": {"application/json": {"schema": {"anyOf": [_array_schema(), {"type": "string"}]}}}},
            **responses,
        },
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": _request_schema()}}}
        },
    )


def _array_schema() -> dict[str, Any]:
    return Array.model_json_schema(by_alias=True)


def _request_schema() -> dict[str, Any]:
    schema = ActRequest.model_json_schema(by_alias=True)
    schema.pop("$defs")
    schema["properties"]["image"] = {"anyOf": [_array_schema(), {"type": "null"}], "default": None}
    return schema


async def _act(service: Service, chunks: Chunks, request: Request) -> Response:
    with service.admission.reading():
        body = await read_body(request, service.settings.max_body_bytes, service.settings.body_timeout_s)
        asked = await parse_body(request.headers, body, ActRequest, forms=False)
        del body
        if double := asked.encoded is not None:
            asked = await asyncio.to_thread(parse_json, (asked.encoded or "").encode(), ActRequest)
        image, instruction = await _checked(asked, service.settings.max_image_pixels)
    episode = asked.episode_id
    request.scope[LOG_KEY] |= {"model": service.label(None), **({"episode_id": episode} if episode else {})}
    service.require_ready()
    row = chunks.take(episode, instruction) if episode is not None else None
    if row is None:
        row, *rest = await _rows(service, request, image, instruction, episode)
        if episode is not None and rest:
            chunks.keep(episode, instruction, rest)
    text = json.dumps(to_json(np.array(row, dtype=np.float64)))
    return Response(json.dumps(text) if double else text, media_type="application/json")


async def _rows(
    service: Service, request: Request, image: NDArray[np.uint8], instruction: str, episode: str | None
) -> list[list[float]]:
    """A new chunk of an episode, the newest question of which wins; without one, a first row."""

    async def job(call: Call) -> Motion:
        return await motion(image, instruction, call, only_first=episode is None)

    work = begin(service, request, job, deadline_ms=wire.DEFAULT_DEADLINE_MS, episode=episode, stream=False)
    answer = await first_event(work)
    await work.stop()
    assert isinstance(answer, Motion)
    return answer.rows


async def _checked(asked: ActRequest, max_pixels: int) -> tuple[NDArray[np.uint8], str]:
    if asked.image is None or asked.instruction is None:
        raise InvalidRequest("expected the fields 'image' and 'instruction', or 'encoded' with both as text")
    value = asked.image.model_dump(by_alias=True)
    try:
        array = await asyncio.to_thread(from_json, value, PIXELS, 3 * max_pixels)
    except ArrayError as problem:
        raise InvalidImage(f"field 'image': {problem}") from None
    return picture(array), asked.instruction
