"""A real server process with one more door: POST /direct calls its engine with nothing of ours around it.

Both doors take the same /actions body. /direct validates it and decodes its picture before the clock starts, so what it
reports is the engine alone; what the whole way over HTTP takes longer is the HTTP layer's. Run as
``python direct_door.py PORT FOLDER``: FOLDER/door.json holds the fields of ``Door``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from server_fakes import FakeEngine, write_models
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm2vla_schema.images import decode_image, from_base64, to_model_square
from vlm2vla_schema.messages import TOP_P_POLICY, ActionsRequest
from vlm2vla_schema.types import ModelCard
from vlm2vla_server import logs
from vlm2vla_server.app import create_app
from vlm2vla_server.bodies import parse_json
from vlm2vla_server.engines.base import Delta, Engine, GenerationRequest
from vlm2vla_server.serving import http_config, tune_process
from vlm2vla_server.settings import Settings
from vlm2vla_server.stages import actions_stage

START_LIMIT_S = 150.0
FOUR_ROWS = (
    "[[0.012, -0.034, 0.0, 1.0], [0.041, 0.0, -0.025, 1.0], [0.0, 0.018, -0.048, 1.0], [0.0, 0.0, -0.007, 0.0]]"
)


@dataclass(frozen=True)
class Door:
    """What to serve: a paced double (model None) with four characters a token, or a real model on the CPU."""

    image_size: int = 112
    token_s: float = 0.0
    prefill_s: float = 0.0
    text: str = FOUR_ROWS
    model: str | None = None
    adapter: str | None = None


@dataclass
class PacedEngine(FakeEngine):
    """A FakeEngine that also takes its time before the first token."""

    prefill_s: float = 0.0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        await asyncio.sleep(self.prefill_s)
        self.requests.clear()  # kept pictures would cost every request fresh pages, which a real engine does not
        async for delta in FakeEngine.generate(self, request):
            yield delta


class DirectDoor:
    """The app, and POST /direct beside it."""

    def __init__(self, app: ASGIApp, engine: Engine, card: ModelCard, adapter: str | None, row_limit_m: float) -> None:
        self._app, self._engine, self._card, self._adapter = app, engine, card, adapter
        self._row_limit_m = row_limit_m

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/direct":
            await self._app(scope, receive, send)
            return
        answer = await self._direct(parse_json(await Request(scope, receive).body(), ActionsRequest))
        await JSONResponse(answer)(scope, receive, send)

    async def _direct(self, asked: ActionsRequest) -> dict[str, Any]:
        stage = actions_stage(asked.subtask, asked.motion_plan, self._card, self._row_limit_m)
        image = to_model_square(decode_image(from_base64(asked.image)), self._card.image_size)
        assert asked.temperature is not None and asked.seed is not None
        limits = (TOP_P_POLICY, asked.seed, asked.max_tokens or stage.max_tokens)
        request = GenerationRequest((image,), stage.prompt, self._adapter, asked.temperature, *limits, stage.grammar)
        pieces, preprocess_ms = [], 0.0
        began_s = time.perf_counter()
        async for delta in self._engine.generate(request):
            pieces.append(delta.text)
            preprocess_ms = delta.preprocess_ms
        took_ms = (time.perf_counter() - began_s) * 1000.0
        text = "".join(pieces)
        return {"ms": took_ms, "preprocess_ms": preprocess_ms, "text": text, "cpu_s": time.process_time()}


def _parts(door: Door, folder: Path) -> tuple[Settings, Engine]:
    if door.model is None:
        engine = PacedEngine(answer=lambda _: door.text, token_s=door.token_s, prefill_s=door.prefill_s)
        return write_models(folder, image_size=door.image_size), engine
    from vlm2vla_server.cli import build_engine

    adapters = (("twin", Path(door.adapter)),) if door.adapter else ()
    settings = Settings(engine="transformers", model=Path(door.model), adapters=adapters, threads=1)
    return settings, build_engine(settings)


def main() -> None:
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    door = Door(**json.loads((folder / "door.json").read_text()))
    settings, engine = _parts(door, folder)
    name, path = settings.adapters[0] if settings.adapters else (None, settings.require_model())
    app = create_app(settings, engine)
    tune_process()
    logs.setup("json")  # as `vlm2vla-server serve` does
    direct = DirectDoor(app, engine, ModelCard.read(path), name, settings.max_row_translation_m)
    uvicorn.Server(http_config(direct, "127.0.0.1", port)).run()


@contextlib.contextmanager
def served(door: Door, folder: Path) -> Iterator[str]:
    """The URL of a ready server process; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "door.json").write_text(json.dumps(asdict(door)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        command = [sys.executable, str(Path(__file__)), str(port), str(folder)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < ends_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server stopped: {log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + "/readyz", timeout=2, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
