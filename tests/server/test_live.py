"""A real process: uvicorn, the transformers engine, a small random model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Live, hang_up, live_server, percentile, probe_health
from server_fakes import GOOD
from tiny_models import write_adapter, write_base

LONG = {"question": "What is it?", "temperature": 0.0, "max_tokens": 3000, "max_attempts": 1, "model": "base"}
HEALTH_LIMIT_MS = 50.0
LATE_TOKENS = 3
"""One token may be in the making when the connection closes; reading /metrics takes the time of another two."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("live")
    base = write_base(root / "base")
    adapter = write_adapter(base, root / "adapter", 1)
    arguments = ["--engine", "transformers", "--model", str(base), "--adapter", f"twin={adapter}"]
    with live_server(arguments, root / "server.log") as server:
        yield server


@pytest.mark.clock
def test_health_answers_while_generations_run(live: Live) -> None:
    probes = asyncio.run(probe_health(live, {**LONG, "max_tokens": 150}, 200))
    assert probes.generating >= 180
    assert percentile(probes.times_ms, 0.99) <= HEALTH_LIMIT_MS


@pytest.mark.clock
@pytest.mark.parametrize(("path", "stream"), [("/vqa", False), ("/actions", True), ("/actions", False)])
def test_a_closed_connection_frees_the_engine_within_one_token(live: Live, path: str, stream: bool) -> None:
    body: dict[str, Any] = {**GOOD[path], **LONG}
    if path == "/actions":
        body = {k: v for k, v in body.items() if k != "question"}
        body |= {"constrained": False, "temperature": 0.0}
    if path == "/actions" and stream:
        body |= {"constrained": True, "temperature": 2.0, "top_p": 1.0, "seed": 1}
    if path == "/vqa":
        body.pop("image", None)
    result = hang_up(live, path, body, stream=stream, after_tokens=10)
    assert result.late_tokens <= LATE_TOKENS, result


def test_seeds_models_and_constraints_over_the_wire(live: Live) -> None:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        body = {**GOOD["/actions"], "seed": 5, "temperature": 1.0}
        one, two = (client.post("/actions", json=body).json() for _ in range(2))
        assert one["actions"] == two["actions"] and one["raw_text"] == two["raw_text"] and one["policy"] is True
        base = client.post("/actions", json={**body, "model": "base"}).json()
        assert base["raw_text"] != one["raw_text"] and base["policy"] is False
        with client.stream("POST", "/actions", json=body, headers={"accept": "application/x-ndjson"}) as answer:
            events = [json.loads(line) for line in answer.iter_lines()]
        assert [e["row"] for e in events[:-1]] == one["actions"] == events[-1]["actions"]
        verdict = client.post("/verify", json={**GOOD["/verify"], "temperature": 1.0, "seed": 2})
        assert verdict.status_code == 200 and set(verdict.json()) >= {"success", "confidence", "reasoning"}


def test_the_deadline_includes_the_time_in_the_queue(live: Live) -> None:
    async def work() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            holder = asyncio.create_task(client.post("/vqa", json=LONG))
            await asyncio.sleep(0.3)
            late = await client.post("/vqa", json={**GOOD["/vqa"], "deadline_ms": 150})
            assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
            holder.cancel()
            await asyncio.gather(holder, return_exceptions=True)

    asyncio.run(work())


def test_a_tiny_request_line_of_curl(live: Live, tmp_path: Path) -> None:
    import base64
    import subprocess

    picture = tmp_path / "frame.jpg"
    picture.write_bytes(base64.b64decode(GOOD["/vqa"]["image"]))
    command = [
        "curl",
        "-sS",
        "-m",
        "60",
        "-F",
        f"image=@{picture}",
        "-F",
        "question=What is orange?",
        "-F",
        "max_tokens=5",
    ]
    done = subprocess.run([*command, f"{live.url}/vqa"], capture_output=True, timeout=90, check=True)
    assert "answer" in json.loads(done.stdout)
