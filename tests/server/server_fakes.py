"""A typed fake Engine, and a caller that speaks ASGI to the app and can hang up at any moment."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from starlette.types import ASGIApp

from vlm2vla_schema.types import ModelCard
from vlm2vla_server.engines.base import (
    AdapterLoad,
    Delta,
    EngineInfo,
    EngineLoad,
    GenerationRequest,
    ScoreRequest,
)
from vlm2vla_server.settings import Settings

T = TypeVar("T")

ROWS_TEXT = "[[0.01, -0.02, 0.0, 1.0], [0.0, 0.0, -0.03, 0.0]]"
ROWS = [[0.01, -0.02, 0.0, 1.0], [0.0, 0.0, -0.03, 0.0]]
VERDICT_TEXT = '{"success": true, "confidence": "High", "reasoning": "It holds the carrot."}'
PLAN_TEXT = "Move forward and slightly left, then down."
SUBTASKS_TEXT = "['Move to Carrot', 'Grasp Carrot']"


def run(work: Coroutine[Any, Any, T], limit_s: float = 30.0) -> T:
    """Run a coroutine with a deadline."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, limit_s)

    return asyncio.run(bounded())


def kill_thread(name: str) -> None:
    """Raise SystemExit inside the newest thread of that name, wherever it is."""
    # The newest: another engine may live for the whole run (engine_contract).
    thread = [one for one in threading.enumerate() if one.name == name][-1]
    assert thread.ident is not None
    done = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    assert done == 1


def answer_by_prompt(request: GenerationRequest) -> str:
    """A good answer to each of the paper's prompts."""
    if request.prompt.startswith("Describe the sequence"):
        return SUBTASKS_TEXT
    if request.prompt.startswith("Given the image"):
        return PLAN_TEXT
    if request.prompt.startswith("You are programming"):
        return ROWS_TEXT
    if request.prompt.startswith("You are a precision"):
        return VERDICT_TEXT
    return "A carrot."


@dataclass
class FakeEngine:
    """Answers from a script, some characters a token. `texts`, when not empty, are given out one a generation."""

    texts: list[str] = field(default_factory=list)
    answer: Callable[[GenerationRequest], str] = answer_by_prompt
    piece_chars: int = 4
    token_s: float = 0.0
    finish: str = "stop"
    failure: Exception | None = None
    difference_nat: float = 0.5
    load_problem: str | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: int = 0
    finished: int = 0
    running: int = 0
    tokens: int = 0
    adapters: tuple[str, ...] = ("twin",)
    slots: int = 0
    death: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def wait_dead(self) -> str:
        return await self.death.get()

    async def close(self) -> None:
        await asyncio.sleep(0)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        text = self.texts.pop(0) if self.texts else self.answer(request)
        pieces = [text[i : i + self.piece_chars] for i in range(0, len(text), self.piece_chars)] or [""]
        self.running += 1
        done = False
        try:
            began_s = time.monotonic()
            for number, piece in enumerate(pieces, start=1):
                # By the clock, as a GPU that decodes on while its last token is still looked at.
                await asyncio.sleep(max(0.0, began_s + number * self.token_s - time.monotonic()))
                if self.failure is not None:
                    raise self.failure
                self.tokens += 1
                last = number == len(pieces)
                done = done or last
                # Times that fit into any real one: a bench adds them to what it measures.
                yield Delta(piece, self.finish if last else None, 100, number, 0, 0.001, 0.002)  # type: ignore[arg-type]  # a test may name any reason
        finally:
            self.running -= 1
            self.finished += done
            self.aborted += not done

    async def score(self, request: ScoreRequest) -> list[float]:
        await asyncio.sleep(0)
        return [-1.0, -2.0] if request.adapter is None else [-1.0 - self.difference_nat, -2.0]

    def info(self) -> EngineInfo:
        loads = tuple(AdapterLoad(name, "ab" * 32, 42, self.load_problem) for name in self.adapters)
        return EngineInfo("fake", "cpu", "float32", 4096, "cd" * 32, loads, {"fake": "1"}, self.slots)

    def load(self) -> EngineLoad:
        return EngineLoad(self.running, 0, self.tokens)

    def control_tokens(self) -> frozenset[str]:
        return frozenset({"<end_of_turn>", "<start_of_image>"})


def write_models(folder: Path, **changes: Any) -> Settings:
    """A base and an adapter folder holding only cards, and settings that name them."""
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True, exist_ok=True)
    stages: Any = ["subtasks", "motion_plan", "actions"]
    ModelCard(name="tiny", base_model="tiny", image_size=28).write(base)
    card = ModelCard(name="twin", base_model="tiny", image_size=28, stages=stages, policy=True)
    card.model_copy(update=changes).write(adapter)
    return Settings(engine="transformers", model=base, adapters=(("twin", adapter),))


def with_settings(settings: Settings, **changes: Any) -> Settings:
    return replace(settings, **changes)


def image_bytes(kind: str = "JPEG", size: tuple[int, int] = (64, 48)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


IMAGE = base64.b64encode(image_bytes()).decode()

GOOD: dict[str, dict[str, Any]] = {
    "/subtasks": {"image": IMAGE, "task": "pick up the carrot"},
    "/motion_plan": {"image": IMAGE, "subtask": "Move to Carrot"},
    "/actions": {"image": IMAGE, "subtask": "Move to Carrot", "motion_plan": "Move forward."},
    "/cycle": {"image": IMAGE, "subtask": "Move to Carrot"},
    "/verify": {"before": IMAGE, "after": IMAGE, "subtask": "Grasp Carrot", "next_subtask": "Lift Carrot"},
    "/vqa": {"image": IMAGE, "question": "What is orange?"},
}


@dataclass
class Answer:
    """What the app sent. `lines` are the events of a stream."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])


class Caller:
    """Sends requests to an ASGI app. `hang_up` closes the connection of the request it is given to."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Sequence[tuple[str, str]] = (),
        hang_up: asyncio.Event | None = None,
        on_chunk: Callable[[bytes], Awaitable[None]] | None = None,
        chunk_bytes: int = 1 << 20,
    ) -> Answer:
        answer, gone = Answer(), hang_up or asyncio.Event()
        parts = [body[i : i + chunk_bytes] for i in range(0, len(body), chunk_bytes)] or [b""]

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.chunks.append(message.get("body", b""))
                if on_chunk is not None:
                    await on_chunk(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        await self.app(scope, receive, send)
        gone.set()
        return answer

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.send("GET", path, headers=list(headers.items()))

    async def post(self, path: str, body: Any, *, stream: bool = False, **more: Any) -> Answer:
        headers = [("content-type", "application/json")]
        if stream:
            headers.append(("accept", "application/x-ndjson"))
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.send("POST", path, raw, headers, **more)


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, *, ready: bool = True) -> AsyncIterator[Caller]:
    """Run the app's lifespan around a Caller; waits until it is ready unless told not to."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}}

    async def live() -> None:
        await app(scope, inbox.get, outbox.put)

    life = asyncio.create_task(live())
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    caller = Caller(app)
    try:
        for _ in range(3000 if ready else 0):
            if (await caller.get("/readyz")).status == 200:
                break
            await asyncio.sleep(0.01)
        yield caller
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
        await life


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.002)
