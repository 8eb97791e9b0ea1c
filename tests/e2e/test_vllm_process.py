"""A server on the real vLLM with the twin's three adapters: the paper's variants (section 4.2) drive the twin, then its
engine process is killed. Runs in .venv-vllm."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2e_fixtures import TwinServer
from variant_checks import ADAPTERS, the_task_is_the_only_subtask, tokens_are_spoken_and_rows_arrive

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
DEATH_LIMIT_S = 60.0


def engine_process(server: int) -> int:
    """The process of vLLM's core below a server."""
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        for child in children.read_text().split():
            if "VLLM::EngineCore".startswith(Path(f"/proc/{child}/comm").read_text().strip()):
                return int(child)
    raise AssertionError(f"process {server} has no engine process")


def exit_code(process: int) -> int:
    """The code that a child exited with; it stays for its Popen to collect."""
    ends_s = time.monotonic() + DEATH_LIMIT_S
    while time.monotonic() < ends_s:
        found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is not None:
            assert found.si_code == os.CLD_EXITED, "the server was killed by a signal"
            return found.si_status
        time.sleep(0.1)
    raise AssertionError(f"the server still ran {DEATH_LIMIT_S:g} s after its engine had been killed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwinServer]:
    running = TwinServer(tmp_path_factory.mktemp("server"), "vllm", **ADAPTERS)
    yield running
    running.close()


def test_action_tokens_are_spoken_and_rows_arrive(server: TwinServer, tmp_path: Path) -> None:
    tokens_are_spoken_and_rows_arrive(server.url, tmp_path / "episode")


def test_without_reasoning_the_task_is_the_only_subtask(server: TwinServer, tmp_path: Path) -> None:
    the_task_is_the_only_subtask(server.url, tmp_path / "episode")


def test_a_killed_engine_process_ends_the_server_with_an_exit_code_for_the_supervisor(server: TwinServer) -> None:
    """Stands last: the server is gone afterwards."""
    fields = {"question": "Say something.", "max_tokens": 20}
    assert httpx.post(f"{server.url}/vqa", json=fields, timeout=120).status_code == 200
    engine = engine_process(server.pid)
    os.kill(engine, signal.SIGKILL)
    assert exit_code(server.pid) == 3
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith('{"time"')]
    assert any("the engine died: vLLM's engine process" in line["message"] for line in lines)
    assert not Path(f"/proc/{engine}").exists()
