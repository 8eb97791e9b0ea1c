"""A server on a real socket that speaks Google's REST API, good or bad, as a test says: generateContent, Batch mode."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gemini_batch_box import BatchBox

GOOD_TEXT = '{"success": true, "confidence": "High", "reasoning": "The gripper holds it."}'

Reply = Callable[[BaseHTTPRequestHandler], None]


def send(status: int, body: bytes, headers: dict[str, str] | None = None) -> Reply:
    """A whole answer."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json; charset=UTF-8")
        handler.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def content(
    *texts: str, finish: str | None = "STOP", tokens: tuple[int, int, int] | None = (700, 40, 300), thought: str = ""
) -> Reply:
    """A GenerateContentResponse; ``tokens``: prompt, candidates, thoughts."""
    parts: list[dict[str, Any]] = [{"text": text} for text in texts]
    if thought:
        parts.insert(0, {"text": thought, "thought": True})
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
    return response(candidates=[candidate], tokens=tokens)


def response(tokens: tuple[int, int, int] | None = (700, 0, 0), **body: Any) -> Reply:
    """A GenerateContentResponse with these fields."""
    if tokens is not None:
        names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount")
        usage: dict[str, Any] = {name: count for name, count in zip(names, tokens, strict=True) if count}
        body["usageMetadata"] = {**usage, "totalTokenCount": sum(tokens)}
    return send(200, json.dumps({**body, "modelVersion": "gemini-2.5-pro"}).encode())


def error(code: int, status: str, message: str = "no", retry_delay: str | None = None, **headers: str) -> Reply:
    """An error in Google's shape; ``retry_delay`` as google.rpc.RetryInfo gives it, such as "2s"."""
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": retry_delay}] if retry_delay else []
    body = {"error": {"code": code, "message": message, "status": status, "details": details}}
    return send(code, json.dumps(body).encode(), headers)


def silence(handler: BaseHTTPRequestHandler) -> None:
    """Takes the request and says nothing for long."""
    handler.server.stopped.wait(20)  # type: ignore[attr-defined]  # our own server class sets it


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """A byte every now and then: never silent, never done."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    ends_s = time.monotonic() + 20
    while time.monotonic() < ends_s and not handler.server.stopped.is_set():  # type: ignore[attr-defined]  # our own server class sets it
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.02)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Closes without a word."""
    handler.close_connection = True


GOOD = content(GOOD_TEXT)


def one_spelling(value: Any) -> Any:
    """Field names as lowerCamelCase: Google's servers take snake_case as well, and its library sends a mixture."""
    if isinstance(value, list):
        return [one_spelling(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {re.sub("_([a-z])", lambda m: m[1].upper(), name): one_spelling(item) for name, item in value.items()}


@dataclass
class Request:
    """What arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class GeminiServer:
    """replies: one for each generateContent, the last for all that come after, unless `chooser` looks at the request.
    models: for GET.
    """

    replies: list[Reply]
    models: Reply
    chooser: Callable[[Request], Reply] | None = None
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    asked_for_models: list[str] = field(default_factory=list)
    token_requests: int = 0
    box: BatchBox = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Batch mode answers as generateContent does."""
        self.box = BatchBox(self.arrived)

    def arrived(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        """Note a request; the reply to it."""
        request = Request(path, headers, one_spelling(body))
        self.requests.append(request)
        return self.next_reply(request)

    def next_reply(self, request: Request) -> Reply:
        """The reply to this request."""
        if self.chooser is not None:
            return self.chooser(request)
        with self._lock:
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, gemini: GeminiServer) -> None:
        self.stopped = threading.Event()
        self.gemini = gemini
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        """generateContent, and the token endpoint of a service account."""
        gemini, data = self.server.gemini, self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.path == "/token":
            gemini.token_requests += 1
            send(200, b'{"access_token": "short-lived", "expires_in": 3600, "token_type": "Bearer"}')(self)
            return
        if gemini.box.post(self, self.path, data, gemini.url):
            return
        assert self.path.endswith(":generateContent"), self.path
        headers = {name.lower(): value for name, value in self.headers.items()}
        gemini.arrived(self.path, headers, json.loads(data))(self)

    def do_DELETE(self) -> None:
        """A file that is not needed any more."""
        self.server.gemini.box.delete(self, self.path)

    def do_GET(self) -> None:
        """A model's description, a job, a file."""
        if self.server.gemini.box.get(self, self.path):
            return
        self.server.gemini.asked_for_models.append(self.path)
        self.server.gemini.models(self)


@contextmanager
def gemini_server(
    *replies: Reply, models: Reply | None = None, chooser: Callable[[Request], Reply] | None = None
) -> Iterator[GeminiServer]:
    """Listens while the block runs."""
    known = send(200, json.dumps({"name": "models/gemini-2.5-pro", "version": "2.5"}).encode())
    gemini = GeminiServer(list(replies) or [GOOD], models or known, chooser)
    server = _Server(gemini)
    gemini.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield gemini
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
