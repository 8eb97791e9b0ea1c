"""A real server process (uvicorn, real engine) and measurements on it; used by the tests and by bench/."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_LIMIT_S = float(os.environ.get("VLM2VLA_TEST_START_LIMIT_S", "120"))
"""More on a machine that is busy with other things."""


@dataclass(frozen=True)
class Live:
    """A running server. log: where its standard error goes. pid: its process."""

    host: str
    port: int
    log: Path
    pid: int = 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def live_server(arguments: Sequence[str], log: Path) -> Iterator[Live]:
    """Start `vlm2vla-server serve` on a free port, wait until it is ready, stop it at the end."""
    port = free_port()
    program = Path(sys.executable).with_name("vlm2vla-server")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        command = [str(program), "serve", "--port", str(port), "--threads", "1", *arguments]
        process = subprocess.Popen(command, stderr=file, env=environment)
    try:
        _wait_ready(f"http://127.0.0.1:{port}/readyz", process, log)
        yield Live("127.0.0.1", port, log, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server stopped: {log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready: {log.read_text()[-2000:]}")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def metric(url: str, name: str) -> float:
    """One unlabelled value of /metrics."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise KeyError(name)
    return float(found[1])


@dataclass(frozen=True)
class Probes:
    """Times of /healthz in milliseconds; `generating`: how many of them fell while a generation ran."""

    times_ms: list[float]
    generating: int


async def probe_health(live: Live, body: dict[str, Any], probes: int, callers: int = 2) -> Probes:
    """GET /healthz `probes` times, a few milliseconds apart, while `callers` keep the engine busy."""
    stop = asyncio.Event()
    busy = 0
    times_ms: list[float] = []
    generating = 0

    async def generate(client: httpx.AsyncClient) -> None:
        nonlocal busy
        while not stop.is_set():
            busy += 1
            await client.post("/vqa", json=body)
            busy -= 1

    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
        tasks = [asyncio.create_task(generate(client)) for _ in range(callers)]
        await asyncio.sleep(0.5)
        # The probe is a bare socket: it measures the server's answer, not an HTTP library.
        reader, writer = await asyncio.open_connection(live.host, live.port)
        for _ in range(probes):
            before = busy
            began_s = time.perf_counter()
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(10):
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]  # None fails the test
            times_ms.append((time.perf_counter() - began_s) * 1000)
            assert head.startswith(b"HTTP/1.1 200"), head
            generating += before > 0 and busy > 0
            await asyncio.sleep(0.01)
        stop.set()
        writer.close()
        await asyncio.gather(*tasks)
    return Probes(times_ms, generating)


@dataclass(frozen=True)
class HangUp:
    """What a closed connection did. late_tokens: decoded after the close; free_ms: until the engine was idle."""

    tokens_before: int
    late_tokens: int
    free_ms: float


def hang_up(live: Live, path: str, body: dict[str, Any], *, stream: bool, after_tokens: int = 20) -> HangUp:
    """Send a long generation, close the connection in the middle, and watch the engine through /metrics."""
    start = metric(live.url, "vlm2vla_engine_decoded_tokens")
    raw = json.dumps(body).encode()
    accept = "application/x-ndjson" if stream else "application/json"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    connection = socket.create_connection((live.host, live.port), timeout=10)
    connection.sendall(head.encode() + raw)
    deadline_s = time.monotonic() + 30
    while (tokens := metric(live.url, "vlm2vla_engine_decoded_tokens")) < start + after_tokens:
        if time.monotonic() > deadline_s:
            raise RuntimeError("the generation did not start")
    closed_s = time.perf_counter()
    connection.close()
    while metric(live.url, "vlm2vla_engine_running") > 0:
        if time.monotonic() > deadline_s:
            raise RuntimeError("the engine was not freed")
    free_ms = (time.perf_counter() - closed_s) * 1000
    return HangUp(int(tokens - start), int(metric(live.url, "vlm2vla_engine_decoded_tokens") - tokens), free_ms)
