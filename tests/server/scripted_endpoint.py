"""An OpenAI-compatible endpoint on a real socket that does what a test says, good or bad."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(status: int, body: str, *headers: str, kind: str = "application/json") -> Reply:
    """A whole answer."""

    async def write(writer: asyncio.StreamWriter) -> None:
        raw = body.encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(raw)}", "Connection: close"]
        writer.write("\r\n".join([*lines, *headers, "", ""]).encode() + raw)
        await writer.drain()

    return write


def completion(**fields: Any) -> Reply:
    return answer(200, json.dumps({"object": "chat.completion", **fields}))


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> str:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


USAGE = json.dumps(
    {
        "choices": [],
        "usage": {"prompt_tokens": 70, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 60}},
    }
)


def stream(*events: str, then: Reply | None = None) -> Reply:
    """Server-sent events in one write each; afterwards the connection closes, unless `then` does something else."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n: hello\n\n")
        for event in events:
            writer.write(f"data: {event}\r\n\r\n".encode())
            await writer.drain()
        if then is not None:
            await then(writer)

    return write


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close without a word."""


async def silence(writer: asyncio.StreamWriter) -> None:
    """Say nothing for long."""
    await asyncio.sleep(20)


GOOD = stream(chunk(""), chunk("A car"), chunk("rot."), chunk(finish="stop"), USAGE, "[DONE]")
MODELS = json.dumps({"data": [{"id": "org/base", "max_model_len": 4096}, {"id": "twin", "parent": "org/base"}]})


class Endpoint:
    """replies: one for each POST, the last for all that come after. requests: the bodies received."""

    def __init__(self, replies: Sequence[Reply], models: Reply) -> None:
        self.replies = list(replies)
        self.models = models
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.left = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            key = re.search(r"authorization: (.*)\r", head, re.IGNORECASE)
            self.keys.append(key[1] if key else "")
            reply = self.models
            if head.startswith("POST /v1/chat/completions "):
                self.requests.append(json.loads(body))
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            speaking = asyncio.ensure_future(reply(writer))
            leaving = asyncio.ensure_future(reader.read())
            await asyncio.wait({speaking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not speaking.done():
                self.left.set()
            for task in (speaking, leaving):
                task.cancel()
            await asyncio.gather(speaking, leaving, return_exceptions=True)
        finally:
            writer.close()


@asynccontextmanager
async def endpoint(*replies: Reply, models: Reply | None = None) -> AsyncIterator[Endpoint]:
    """Listen while the block runs."""
    made = Endpoint(replies or [GOOD], models or answer(200, MODELS))
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield made
    finally:
        server.close()
