"""A policy server for `soak_twin.py`: real HTTP on loopback, the scripted expert for a model, faults on demand."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from soak_twin_faults import Faults

from vlm2vla_schema.parsing import parse_actions, parse_subtasks
from vlm2vla_twin.expert import Expert

STAGES = ["subtasks", "motion_plan", "actions"]
ROW_EVERY_S = 0.03
STALL_S = 5.0
SILENT = ("server half-open", "server stalled 5 s")
INFO = {
    "protocol": 1, "model": "expert", "policy": True, "stages": STAGES, "prompt_versions": {}, "units": {},
    "limits": {"max_row_translation_m": 0.1, "max_rows": 32, "max_body_mb": 16.0, "max_concurrency": 1},
    "image_size": 224, "engine": "soak", "versions": {},
    "adapters": [{"name": "expert", "hash": "0", "policy": True, "proven": True, "card": {
        "name": "expert", "base_model": "base", "image_size": 224, "stages": STAGES, "policy": True}}],
}  # fmt: skip


def stage(asked: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What every generating answer carries."""
    return {
        "model": "expert", "policy": True, "prompt_version": "d4", "raw_text": "...", "attempts": 1,
        "finish_reason": "stop", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0},
        "timing_ms": {"queue": 0.0, "preprocess": 0.0, "first_token": 0.0, "generate": 1.0, "total": 1.0},
        **{name: asked.get(name) for name in ("request_id", "episode_id", "frame_id")}, **more,
    }  # fmt: skip


class PolicyServer:
    """Answers for the world of the running episode; `expert` is set before each.

    late_s: how long an answer that is late is held back.
    """

    def __init__(self, faults: Faults, late_s: float) -> None:
        self.faults, self.late_s = faults, late_s
        self.expert: Expert | None = None
        self.chance = random.Random(0)
        self.connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listens, again on the same port after it was killed; nothing when it does already."""
        if self._server is not None:
            return
        handler = type("Handler", (Handler,), {"owner": self})
        self._server = QuietServer(("127.0.0.1", self.port), handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="server", daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """As a process that dies: nobody listens any more and every connection ends."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.server_close()
        self._thread.join(5.0)
        self.hang_up()

    def hang_up(self) -> None:
        """Ends what connections are left, so that no thread waits for them."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up is what is being tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ClassVar[PolicyServer]

    def setup(self) -> None:
        super().setup()
        self.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.owner.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to standard error."""

    def do_GET(self) -> None:
        self._wait()
        self._json(200, INFO if self.path == "/info" else {"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._wait()
        expert = self.owner.expert
        assert expert is not None
        try:
            if self.path == "/subtasks":
                self._json(200, stage(asked, subtasks=parse_subtasks(expert.subtasks(asked["task"]))))
            else:
                self._stream(asked, expert)
        except (KeyError, ValueError, RuntimeError) as error:
            message = {"code": "unparseable_output", "message": str(error), "details": None, "request_id": None}
            self._json(502, {"error": message})

    def _wait(self) -> None:
        """Says nothing for as long as the server is half-open or stalled."""
        faults = self.owner.faults
        for kind in SILENT:
            if faults.meets(kind):
                faults.cleared.wait(STALL_S if kind == "server stalled 5 s" else None)

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, asked: dict[str, Any], expert: Expert) -> None:
        plan = expert.motion_plan(asked["subtask"])
        rows = parse_actions(expert.actions(asked["subtask"], plan)).rows
        lines = [{"event": "plan", "motion_plan": plan}]
        lines += [{"event": "row", "index": index, "row": row} for index, row in enumerate(rows)]
        lines.append(stage(asked, event="done", motion_plan=plan, actions=rows,
                           stages={"motion_plan": stage(asked), "actions": stage(asked)}))  # fmt: skip
        self.send_response(200)
        self.send_header("content-type", "application/x-ndjson")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for data in self._spoilt(lines):
            self._wait()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            time.sleep(ROW_EVERY_S)
        self.wfile.write(b"0\r\n\r\n")

    def _spoilt(self, lines: list[dict[str, Any]]) -> Iterator[bytes]:
        """The stream's lines as bytes, wrong in the way that the active fault says."""
        faults, held_back = self.owner.faults, False
        for index, line in enumerate(lines):
            data = json.dumps(line).encode() + b"\n"
            if index and not held_back and faults.meets("answer late"):
                faults.cleared.wait(self.owner.late_s)
                held_back = True
            if index and faults.meets("corrupt JSON"):
                yield data[: self.owner.chance.randrange(1, len(data) - 2)] + b"\n"
                return
            if line["event"] == "row" and index + 1 < len(lines) - 1 and faults.meets("rows reordered"):
                yield json.dumps(lines[index + 1]).encode() + b"\n"
            yield data
            if line["event"] == "row" and faults.meets("rows twice"):
                yield data
