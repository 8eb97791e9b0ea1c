"""Other people's policy servers, over their own libraries: json-numpy's and openpi-client's encoders and decoders.

Imitated behaviour, our own code. Sources: openpi's src/openpi/serving/websocket_policy_server.py, openvla's
vla-scripts/deploy.py (embodied-CoT has the same file), and the servers in the examples of allenai/molmoact2.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import json_numpy
import numpy as np
from numpy.typing import NDArray
from openpi_client import msgpack_numpy
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

Rows = Sequence[Sequence[float]]
REASONING = "USER: pick it up? ASSISTANT: TASK: Pick up the carrot. PLAN: reach, grasp, lift. ACTION: <0x1a>"


class Script:
    """Rows of seven numbers in order, then rest with the gripper closed; remembers what it was asked."""

    def __init__(self, rows: Rows, per_answer: int = 1) -> None:
        self._rows = [np.array(row, dtype=np.float64) for row in rows]
        self._per_answer = per_answer
        self.asked: list[dict[str, Any]] = []

    def __call__(self, payload: dict[str, Any]) -> NDArray[np.float64]:
        begin = len(self.asked) * self._per_answer
        self.asked.append(payload)
        rows = self._rows[begin : begin + self._per_answer]
        rows += [np.zeros(7)] * (self._per_answer - len(rows))
        return np.stack(rows)


Answers = Callable[[dict[str, Any]], tuple[int, bytes]]


def openvla(script: Script) -> Answers:
    """deploy.py: any failure is HTTP 200 with the string "error"; strings are answered to whoever sent strings."""

    def answer(payload: dict[str, Any]) -> tuple[int, bytes]:
        try:
            if encoded := "encoded" in payload:
                payload = json_numpy.loads(payload["encoded"])
            Image.fromarray(payload["image"]).convert("RGB")
            payload["prompt"] = f"In: What action should the robot take to {payload['instruction'].lower()}?\nOut:"
            if payload["unnorm_key"] not in ("bridge_orig", "fractal20220817_data"):
                raise ValueError("no such statistics")
            text = json_numpy.dumps(script(payload)[0])
            return 200, (json.dumps(text) if encoded else text).encode()
        except Exception:
            return 200, b'"error"'

    return answer


def ecot(script: Script) -> Answers:
    """The same, with the generated text beside the action."""
    plain = openvla(script)

    def answer(payload: dict[str, Any]) -> tuple[int, bytes]:
        status, body = plain(payload)
        return status, b"[%s, %s]" % (body, json.dumps(REASONING).encode())

    return answer


def molmoact(script: Script) -> Answers:
    """Actions [N, D] by name; a missing field is 400 with a plain error."""

    def answer(payload: dict[str, Any]) -> tuple[int, bytes]:
        if "instruction" not in payload or "state" not in payload:
            return 400, json_numpy.dumps({"error": "missing required field"}).encode()
        actions = script(payload).astype(np.float32)
        return 200, json_numpy.dumps({"actions": actions, "dt_ms": 1.0}).encode()

    return answer


@contextlib.contextmanager
def act_server(answers: Answers) -> Iterator[str]:
    """An HTTP server with ``POST /act`` only; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as behind uvicorn

        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status, answer = (404, b'{"detail":"Not Found"}')
            if self.path == "/act" and self.headers["content-type"] == "application/json":
                status, answer = answers(json_numpy.loads(body))
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextlib.contextmanager
def openpi_server(infer: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[str]:
    """openpi's websocket: metadata, then an answer for each observation; a traceback as text before it closes."""

    def handle(socket: ServerConnection) -> None:
        packer = msgpack_numpy.Packer()
        socket.send(packer.pack({"model": "pi05"}))
        with contextlib.suppress(ConnectionClosed):
            while True:
                observation = msgpack_numpy.unpackb(socket.recv())
                try:
                    answer = infer(observation)
                except Exception as error:
                    socket.send(f"Traceback (most recent call last):\n  File x\n{type(error).__name__}: {error}")
                    socket.close(1011)
                    return
                socket.send(packer.pack({**answer, "server_timing": {"infer_ms": 1.0}}))

    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(5)
