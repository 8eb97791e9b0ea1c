"""What the end-to-end tests share: a server process that can be killed, a scene, and a watching progress."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import RecordedEpisode

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "twin"
START_LIMIT_S = 150.0
VLLM_START_LIMIT_S = 600.0


class ServerProcess:
    """``e2e_server.py`` on a free port. url, log, pid: where it answers, what it wrote, its process."""

    start_limit_s = START_LIMIT_S

    def __init__(self, folder: Path, texts: dict[str, Any], token_s: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "texts.json").write_text(json.dumps({"texts": texts, "token_s": token_s}))
        self._start(folder, lambda port: [sys.executable, str(HERE / "e2e_server.py"), str(port), str(folder)])

    def _start(self, folder: Path, command: Callable[[int], list[str]]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        self._file = self.log.open("wb")
        self._process = subprocess.Popen(command(port), stdout=self._file, stderr=subprocess.STDOUT)
        self.pid = self._process.pid
        self.killed_s: float | None = None
        self._wait()

    def _wait(self) -> None:
        ends_s = time.monotonic() + self.start_limit_s
        while time.monotonic() < ends_s:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(self.url + "/readyz", timeout=1.0, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        self.close()
        raise AssertionError("the server did not start:\n" + self.log.read_text())

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self.killed_s is None:
            self._process.send_signal(signal.SIGKILL)
            self.killed_s = time.monotonic()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing is said any more."""
        if self.killed_s is None:
            self._process.send_signal(signal.SIGSTOP)
            self.killed_s = time.monotonic()

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(timeout=10)
        self._file.close()


class TwinServer(ServerProcess):
    """``vlm2vla-server serve`` with the real model of models/twin and some of its adapters, by folder."""

    def __init__(self, folder: Path, engine: str = "transformers", **adapters: str) -> None:
        if engine == "vllm":
            self.start_limit_s = VLLM_START_LIMIT_S
        folder.mkdir(parents=True, exist_ok=True)
        program = str(Path(sys.executable).with_name("vlm2vla-server"))
        model = ["--model", str(MODEL / "base"), "--threads", "1"]
        for name, path in (adapters or {"twin": "adapter"}).items():
            model += ["--adapter", f"{name}={MODEL / path}"]
        serve = [program, "serve", "--engine", engine, *model]
        self._start(folder, lambda port: [*serve, "--port", str(port)])


class OnEvent(SilentProgress):
    """Calls a function at the first event of one kind (plan, row or decision)."""

    def __init__(self, kind: str, then: Callable[[], None]) -> None:
        self._kind = kind
        self._then: Callable[[], None] | None = then

    def _happened(self, kind: str) -> None:
        if kind == self._kind and self._then is not None:
            then, self._then = self._then, None
            then()

    def plan(self, motion_plan: str) -> None:
        self._happened("plan")

    def row(self, index: int, row: Sequence[float]) -> None:
        self._happened("row")

    def decision(self, index: int, row: Sequence[float], verdict: str, reasons: Sequence[str]) -> None:
        self._happened("decision")


def texts_of(episode: RecordedEpisode) -> dict[str, Any]:
    """The texts of a recorded episode of the expert, for the server to recite."""
    plans = [str(event["motion_plan"]) for event in episode.of("plan")]
    actions = [str(event["answer"]["raw_text"]) for event in episode.of("answer")]
    subtasks = [str(event["subtask"]) for event in episode.of("request") if event["stage"] == "cycle"]
    return {
        "subtasks": str(episode.of("subtasks")[0]["answer"]["raw_text"]),
        "plans": dict(zip(subtasks, plans, strict=True)),
        "actions": dict(zip(plans, actions, strict=True)),
    }


def first_after(episode: RecordedEpisode, kind: str, after_s: float) -> dict[str, Any]:
    """The first event of a kind recorded after a moment of this machine's monotonic clock."""
    return next(event for event in episode.of(kind) if event["t_s"] >= after_s)
