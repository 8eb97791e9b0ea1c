"""From a frame's last pixel to its request on the wire: copy, capture thread, JPEG, base64, JSON, HTTP, a socket.

    python bench/capture_to_wire.py --out bench/results/capture_to_wire.json

A source delivers 640x480 pictures with a camera's noise at 30 Hz and notes when each is complete, before the client's
first copy; another process notes when the last byte of the request that carries it has arrived, by the same monotonic
clock. Must: below 10 ms at p50. Exit code 1 when that did not hold. Other programs on the same processors come in
between: `load_average` says how busy the machine was; under `chrt --fifo 1` (`real_time` in the result) they do not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.cameras.capture import CaptureCamera, Picture
from vlm2vla_client.clock import SystemClock
from vlm2vla_client.evaluation.statistics import quantile
from vlm2vla_client.http import ServerConnection
from vlm2vla_schema.images import encode_jpeg

LIMIT_MS = 10.0
FPS, WIDTH, HEIGHT = 30, 640, 480
WARM_UP = 10
CAMERA_NOISE = 2.0
DEADLINE_S = 10.0
START_S = 60.0


class NoisySource:
    """Pictures on which JPEG works as hard as on a camera's."""

    name = "benchmark"

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        smooth = np.stack([90 + 60 * np.sin(x / 40), 110 + 50 * np.cos(y / 30), 80 + (x + y) / 20], axis=2)
        noisy = [smooth + random.normal(0.0, CAMERA_NOISE, smooth.shape) for _ in range(8)]
        self._buffers: list[NDArray[np.uint8]] = [np.clip(image, 0, 255).astype(np.uint8) for image in noisy]
        self._number, self._due_s = -1, 0.0

    def open(self) -> None:
        self._due_s = time.monotonic()

    def read(self, timeout_s: float) -> Picture | None:
        time.sleep(max(self._due_s - time.monotonic(), 0.0))
        self._due_s = max(self._due_s + 1.0 / FPS, time.monotonic())
        self._number += 1
        complete_s = time.monotonic()
        # The copy out of the driver's memory is part of what is measured.
        return Picture(np.array(self._buffers[self._number % 8]), complete_s, self._number)

    def close(self) -> None:
        return


class WireHandler(BaseHTTPRequestHandler):
    """Answers when the request was complete."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"arrived_s": time.monotonic()}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: Any) -> None:
        return


def serve(ports: Queue[int]) -> None:
    """The other end of the wire; runs in a process of its own, which is ended from outside."""
    with HTTPServer(("127.0.0.1", 0), WireHandler) as server:
        ports.put(server.server_address[1])
        server.serve_forever()


def measure(requests: int) -> dict[str, Any]:
    """Milliseconds of `requests` requests, part by part."""
    clock = SystemClock()
    context = multiprocessing.get_context("spawn")
    ports: Queue[int] = context.Queue()
    server = context.Process(target=serve, args=(ports,), daemon=True)
    server.start()
    camera = CaptureCamera(NoisySource(), clock)
    connection = ServerConnection(f"http://127.0.0.1:{ports.get(timeout=START_S)}")
    total, encode, size = [], [], 0
    try:
        camera.start()
        for number in range(WARM_UP + requests):
            frame = camera.after(clock.now_s(), 5.0)
            begun_s = time.monotonic()
            jpeg = encode_jpeg(frame.image)
            encoded_s = time.monotonic()
            fields = {"subtask": "Move to Carrot", "frame_id": frame.frame_id}
            answer = connection.post("/cycle", fields, {"image": jpeg}, DEADLINE_S)
            if number >= WARM_UP:
                total.append(1000.0 * (answer["arrived_s"] - frame.stamp_s))
                encode.append(1000.0 * (encoded_s - begun_s))
                size = len(jpeg)
    finally:
        camera.close()
        connection.close()
        server.terminate()
        server.join()
    return {"last_pixel_to_wire_ms": shares(total), "jpeg_ms": shares(encode), "jpeg_bytes": size, "requests": requests}


def shares(values: Sequence[float]) -> dict[str, float]:
    """p10, p50, p95, p99 of some milliseconds."""
    ordered = sorted(values)
    return {f"p{share}": round(quantile(ordered, share / 100), 2) for share in (10, 50, 95, 99)}


def about_run() -> dict[str, Any]:
    """How busy the machine is just now, and whether others have to wait for this program."""
    real_time = hasattr(os, "SCHED_FIFO") and os.sched_getscheduler(0) == os.SCHED_FIFO
    return {"load_average": [round(value, 2) for value in os.getloadavg()], "real_time": real_time}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    run = about_run()
    result = measure(arguments.requests)
    held = result["last_pixel_to_wire_ms"]["p50"] < LIMIT_MS
    machine = {"machine": platform.machine(), "processors": os.cpu_count(), "python": platform.python_version()}
    result |= {"limit_ms": LIMIT_MS, "held": held, **run, **machine}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
