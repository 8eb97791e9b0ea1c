"""openpi's websocket at "/", so that the clients of pi-0.5 drive our policy.

Wire format (github.com/Physical-Intelligence/openpi, src/openpi/serving/websocket_policy_server.py): msgpack maps with
arrays as `vlm2vla_schema.arrays` describes them. First our metadata; then every observation is answered with the whole
chunk as `actions` [N, 7], N differing from answer to answer. An error is a text frame with code and message, after
which the connection is closed, as openpi's own server does; a robot that asks again connects again.

It is there when the libraries of `vlm2vla-server[openpi]` are.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.websockets import WebSocket, WebSocketDisconnect

from vlm2vla_schema import messages as wire
from vlm2vla_schema.arrays import PIXELS, from_msgpack, to_msgpack
from vlm2vla_schema.errors import ArrayError
from vlm2vla_server import logs
from vlm2vla_server.admission import Priority, Ticket
from vlm2vla_server.errors import InvalidImage, InvalidRequest, PayloadTooLarge, ServerError
from vlm2vla_server.exchange import outcome_of
from vlm2vla_server.generation import Call
from vlm2vla_server.policy import Clocking
from vlm2vla_server.service import Service
from vlm2vla_server.whole import Motion, motion, picture

log = logging.getLogger("vlm2vla_server")

PATH = "/"
IMAGE_KEYS = ("observation/image", "observation/exterior_image_1_left", "image")
"""Where observations have the picture from outside (openpi's LIBERO, its DROID, anybody's); the first that is there."""
MAX_CONNECTIONS = 64
MAX_MESSAGE_BYTES = 4 * 2**20
"""Three pictures of 640x480; what is unpacked is held in memory whole."""
SEND_TIMEOUT_S = 10.0
_MAX_FIELDS = 64
_INTERNAL_ERROR, _TRY_LATER = 1011, 1013


def installed() -> bool:
    """Whether the libraries are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("msgpack", "websockets"))


class Door:
    """The websocket of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open = 0

    async def serve(self, socket: WebSocket) -> None:
        """One connection, until the caller leaves or something fails."""
        if self._open >= MAX_CONNECTIONS:
            await socket.close(_TRY_LATER)
            return
        self._open += 1
        try:
            await socket.accept()
            await self._talk(socket)
        except (WebSocketDisconnect, TimeoutError, OSError):
            log.info("an openpi client left")
        finally:
            self._open -= 1

    async def _talk(self, socket: WebSocket) -> None:
        await _send(socket, _packed(self._metadata()))
        while (message := await socket.receive())["type"] != "websocket.disconnect":
            began_s = time.monotonic()
            answer = await self._answer(socket, message, began_s)
            took_ms = (time.monotonic() - began_s) * 1000.0
            code = answer.code.value if isinstance(answer, ServerError) else "ok"
            log.info("openpi", extra=logs.fields(code=code, ms=round(took_ms, 1)))
            if isinstance(answer, ServerError):
                await _refuse(socket, answer)
                return
            await _send(socket, _packed(_fields(answer, took_ms)))

    def _metadata(self) -> dict[str, Any]:
        service = self._service
        return {
            "server": "vlm2vla-server",
            "protocol": wire.PROTOCOL,
            "model": service.default_model,
            "policy": service.info().policy,
            "action": "BridgeData V2: dx_m, dy_m, dz_m, droll_rad, dpitch_rad, dyaw_rad, gripper (1 open); no turns",
        }

    async def _answer(self, socket: WebSocket, message: Mapping[str, Any], began_s: float) -> Motion | ServerError:
        """The motion, or why there is none. Raises WebSocketDisconnect when the caller leaves meanwhile."""
        service = self._service
        try:
            with service.admission.reading():
                image, prompt = await asyncio.to_thread(
                    read_observation, message.get("bytes"), service.settings.max_image_pixels
                )
            service.require_ready()
        except ServerError as problem:
            return problem
        clocking = Clocking(began_s, began_s + wire.DEFAULT_DEADLINE_MS / 1000.0)
        address = socket.client.host if socket.client is not None else ""
        ticket = Ticket(began_s, clocking, Priority.ACT, address, service.label(None))
        left = asyncio.Event()

        async def job() -> Motion:
            return await motion(image, prompt, Call(service, clocking), only_first=False)

        work = asyncio.create_task(outcome_of(service, ticket, None, left, job))
        ticket.attach(work)
        leaving = asyncio.create_task(socket.receive())
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                left.set()
                if leaving.result()["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect
                return InvalidRequest("an observation came before the last one was answered")
            answer = await work
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)
        assert isinstance(answer, Motion | ServerError)
        return answer


def read_observation(data: object, max_pixels: int) -> tuple[NDArray[np.uint8], str]:
    """Picture and instruction of one observation; whatever else it holds (state, other cameras) is not used.

    Raises PayloadTooLarge, InvalidRequest, InvalidImage.
    """
    import msgpack

    if not isinstance(data, bytes):
        raise InvalidRequest("expected a binary message in msgpack")
    if len(data) > MAX_MESSAGE_BYTES:
        raise PayloadTooLarge(f"the message is larger than {MAX_MESSAGE_BYTES} bytes")
    try:
        value = msgpack.unpackb(data, max_map_len=_MAX_FIELDS, max_array_len=_MAX_FIELDS, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise InvalidRequest("the message is not a msgpack map of at most 64 fields") from None
    if not isinstance(value, dict):
        raise InvalidRequest("expected a map")
    prompt = value.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequest("expected the field 'prompt' as text")
    key = next((name for name in IMAGE_KEYS if name in value), None)
    if key is None:
        raise InvalidRequest(f"expected a picture as one of the fields {', '.join(IMAGE_KEYS)}")
    try:
        return picture(from_msgpack(value[key], PIXELS, 3 * max_pixels)), prompt
    except ArrayError as problem:
        raise InvalidImage(f"field {key!r}: {problem}") from None


def _fields(answer: Motion, took_ms: float) -> dict[str, Any]:
    return {
        "actions": to_msgpack(np.array(answer.rows, dtype=np.float64)),
        "subtask": answer.subtask,
        "motion_plan": answer.motion_plan,
        "server_timing": {"infer_ms": took_ms},
    }


def _packed(value: Mapping[str, Any]) -> bytes:
    import msgpack

    return bytes(msgpack.packb(value))


async def _send(socket: WebSocket, data: bytes) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await socket.send_bytes(data)


async def _refuse(socket: WebSocket, problem: ServerError) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await socket.send_text(f"{problem.code.value}: {problem.message}")
        await socket.close(_INTERNAL_ERROR)
