"""The server as a process: signals, exit codes, callers that are slow to send or to read."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_process import process
from server_fakes import GOOD


@dataclass
class Stream(threading.Thread):
    """Reads /actions as a stream, on a thread; `begun` is set by its first event."""

    url: str
    events: list[dict[str, Any]] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    problem: Exception | None = None

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        headers = {"accept": "application/x-ndjson"}
        try:
            with httpx.stream("POST", f"{self.url}/actions", json=GOOD["/actions"], headers=headers, timeout=60) as got:
                for line in got.iter_lines():
                    self.events.append(json.loads(line))
                    self.begun.set()
        except httpx.HTTPError as problem:
            self.problem = problem

    def start_and_wait(self) -> None:
        self.start()
        assert self.begun.wait(30)


def test_sigterm_under_load_finishes_what_it_can_and_exits_with_0(tmp_path: Path) -> None:
    # 31 rows of about 6 tokens: too long for the drain time; the second request waits behind it
    with process(tmp_path, token_s=0.1, drain_s=6.0) as server:
        running = Stream(server.url)
        running.start_and_wait()
        queued: list[httpx.Response] = []
        waiter = threading.Thread(
            target=lambda: queued.append(httpx.post(f"{server.url}/vqa", json=GOOD["/vqa"], timeout=60)), daemon=True
        )
        waiter.start()
        _until(server.url, "vlm2vla_queued")
        server.popen.send_signal(signal.SIGTERM)
        _until_draining(server.url)
        refused = httpx.post(f"{server.url}/cycle", json=GOOD["/cycle"], timeout=10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert server.ends() == 0
        running.join(10)
        waiter.join(10)
        assert [event["event"] for event in running.events].count("error") == 1
        assert running.events[-1]["error"]["code"] == "not_ready"
        assert [answer.status_code for answer in queued] == [503]
        assert any(line["message"].startswith("stopping") for line in server.lines())


def test_sigterm_waits_for_what_finishes_in_time(tmp_path: Path) -> None:
    with process(tmp_path, token_s=0.005, drain_s=60.0) as server:
        running = Stream(server.url)
        running.start_and_wait()
        server.popen.send_signal(signal.SIGTERM)
        assert server.ends() == 0
        running.join(10)
        assert running.events[-1]["event"] == "done" and len(running.events[-1]["actions"]) == 31


def test_a_second_signal_cuts_at_once(tmp_path: Path) -> None:
    with process(tmp_path, token_s=1.0, drain_s=600.0) as server:
        thread = threading.Thread(
            target=lambda: httpx.post(f"{server.url}/actions", json=GOOD["/actions"], timeout=60), daemon=True
        )
        thread.start()
        _until(server.url, "vlm2vla_in_flight")
        server.popen.send_signal(signal.SIGTERM)
        _until_draining(server.url)
        server.popen.send_signal(signal.SIGTERM)
        assert server.ends() == 0


def test_a_dead_engine_ends_the_process_with_an_exit_code_for_the_supervisor(tmp_path: Path) -> None:
    with process(tmp_path, token_s=0.05) as server:
        running = Stream(server.url)
        running.start_and_wait()
        server.popen.send_signal(signal.SIGUSR1)
        assert server.ends() == 3
        running.join(10)
        assert running.events[-1]["event"] == "error" and running.events[-1]["error"]["code"] == "engine_failure"
        assert any("the engine died: SIGUSR1" in line["message"] for line in server.lines())


def test_a_killed_process_closes_its_connections_and_can_be_started_again(tmp_path: Path) -> None:
    with process(tmp_path, token_s=0.05) as server:
        running = Stream(server.url)
        running.start_and_wait()
        server.popen.kill()
        assert server.ends() == -signal.SIGKILL
        running.join(10)
        assert not running.is_alive() and {event["event"] for event in running.events} == {"row"}
        assert isinstance(running.problem, httpx.HTTPError)
    with process(tmp_path):
        pass


def test_a_caller_that_reads_one_byte_a_second_holds_nobody_up(tmp_path: Path) -> None:
    with process(tmp_path, token_s=0.0) as server:
        body = json.dumps(GOOD["/actions"]).encode()
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", server.port))
        head = (
            "POST /actions HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        slow.sendall(head.encode() + body)
        received = b""
        for _ in range(4):
            received += slow.recv(1)
            # the engine, which runs one request at a time, is free for others all the while
            answer = httpx.post(f"{server.url}/actions", json=GOOD["/actions"], timeout=20)
            assert answer.status_code == 200 and len(answer.json()["actions"]) == 31
            time.sleep(1.0)
        assert received == b"HTTP"
        assert _metric(server.url, "vlm2vla_engine_running") == 0
        slow.close()


def test_a_caller_that_sends_one_byte_a_second_is_given_up(tmp_path: Path) -> None:
    with process(tmp_path, token_s=0.0) as server:
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        slow.sendall(b"POST /vqa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n")
        began_s = time.monotonic()
        slow.settimeout(1.0)
        answer = b""
        while b"}" not in answer and time.monotonic() - began_s < 20:
            with contextlib.suppress(OSError):
                slow.sendall(b"x")
                answer += slow.recv(65536)
            assert httpx.get(f"{server.url}/readyz", timeout=10).status_code == 200
        assert answer.startswith(b"HTTP/1.1 504") and b"deadline_exceeded" in answer
        slow.close()


def test_headers_without_an_end_are_refused_after_a_bounded_length(tmp_path: Path) -> None:
    with process(tmp_path, token_s=0.0) as server:
        endless = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        endless.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: ")
        sent, answer = 0, b""
        with contextlib.suppress(ConnectionError):
            while sent < 8 * 2**20 and not answer:
                sent += endless.send(b"a" * 4096)
                if select.select([endless], [], [], 0.001)[0]:
                    answer = endless.recv(65536) or b"closed"
        assert sent < 8 * 2**20
        assert answer in (b"", b"closed") or answer.startswith(b"HTTP/1.1 400")
        assert httpx.get(f"{server.url}/readyz", timeout=10).status_code == 200
        endless.close()


def _metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(name + " ")))


def _until(url: str, gauge: str) -> None:
    """Wait until a gauge of /metrics is at least 1."""
    deadline_s = time.monotonic() + 20
    while _metric(url, gauge) < 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def _until_draining(url: str) -> None:
    deadline_s = time.monotonic() + 20
    while httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx must talk to this machine directly."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


PICTURES = """
import resource, threading
from vlm2vla_server.serving import tune_process

def pictures():
    return [bytes([number]) * (640 * 480 * 3) for number in range(3)]

def count():
    for _ in range(5):
        pictures()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(20):
        pictures()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

if {tuned}:
    tune_process()
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


def fresh_pages(tuned: bool) -> int:
    """How many pages a thread fetched from the system for twenty times three pictures, after the first ones."""
    command = [sys.executable, "-c", PICTURES.format(tuned=tuned)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_a_request_takes_its_pictures_from_memory_that_the_last_one_freed() -> None:
    assert fresh_pages(tuned=True) < 100 < 5_000 < fresh_pages(tuned=False)
