"""The process around the app: how it stops on a signal, and how it ends when its engine has died."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import socket
import sys
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from vlm2vla_server.openpi import MAX_MESSAGE_BYTES
from vlm2vla_server.service import Service

log = logging.getLogger("vlm2vla_server")

DEATH_LINGER_S = 1.0
"""From the engine's death to the end of the process: callers get their errors, probes see /readyz red."""
FLUSH_TIMEOUT_S = 5
MAX_HEADER_BYTES = 16 * 1024
SWITCH_INTERVAL_S = 0.001
"""Python's default lets the engine's thread keep the interpreter 5 ms at a time; /healthz should not wait for that."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's <malloc.h>
_KEPT_BYTES, _LARGE_BYTES = 64 << 20, 32 << 20


def tune_process() -> None:
    """Set what holds for the whole process: how often threads take turns, and that freed memory is kept for the next
    request. A camera's picture is a megabyte, in three buffers; glibc would give each back to the system when it is
    freed, and fetching hundreds of fresh pages costs a request 1 to 3 ms. Buffers of 32 MiB and more still go back."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # another C library has its own ways
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class DrainingServer(uvicorn.Server):
    """uvicorn that drains first: SIGTERM or SIGINT makes the service not ready and gives what runs `drain_s` seconds; a
    second signal cuts it at once. Meanwhile the port stays open and answers `not_ready`."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped by a signal or by the engine's death."""
        self._loop = asyncio.get_running_loop()
        watching = asyncio.create_task(self._leave_when_dead())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal handler: it only wakes the event loop."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._stopping is None:
            log.info("stopping: running requests have %g s to finish", self._drain_s)
            self._stopping = asyncio.create_task(self._drain())
        else:
            log.info("stopping at once")
            self._service.cut()
            self.should_exit = True

    async def _drain(self) -> None:
        await self._service.drain(self._drain_s)
        self.should_exit = True

    async def _leave_when_dead(self) -> None:
        await self._service.dead.wait()
        await asyncio.sleep(DEATH_LINGER_S)
        self.should_exit = True


def http_config(app: ASGIApp, host: str, port: int) -> uvicorn.Config:
    """How the app is served: on uvloop's event loop where that is installed, which saves about half a millisecond a
    request. HTTP is read by h11 even where httptools is installed (vLLM brings it): httptools is quicker still, but
    takes headers without an end, h11 refuses more than MAX_HEADER_BYTES."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
        server_header=False,
    )


def run(app: ASGIApp, service: Service) -> bool:
    """Serve on the settings' address until a signal or the engine's death. Returns whether the port could be opened."""
    settings = service.settings
    config = http_config(app, settings.host, settings.port)
    server = DrainingServer(config, service, settings.drain_s)
    server.run()
    return server.started
