"""A server process over the scripted engine (fake_server.py), started on a free port and always stopped."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

PROGRAM = Path(__file__).with_name("fake_server.py")
START_LIMIT_S = 120.0
END_LIMIT_S = 40.0


@dataclass
class Process:
    """A running fake_server.py."""

    port: int
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ends(self) -> int:
        return self.popen.wait(END_LIMIT_S)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextlib.contextmanager
def process(folder: Path, token_s: float = 0.02, drain_s: float = 1.0) -> Iterator[Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder / "log"
    with log.open("wb") as file:
        arguments = [sys.executable, str(PROGRAM), str(folder), str(port), str(token_s), str(drain_s)]
        popen = subprocess.Popen(arguments, stderr=file)
    try:
        one = Process(port, popen, log)
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{one.url}/readyz", timeout=2).status_code == 200:
                    break
            assert popen.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield one
    finally:
        popen.kill()
        popen.wait(10)
