"""bench/soak_server.py: that it finds nothing wrong with a sound server, and does find what is wrong."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_process import process

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("soak", "soak_server", "soak_server_load"):
        sys.modules.pop(name, None)
    return importlib.import_module("soak_server")


@pytest.fixture
def callers(soak: Any) -> Any:
    return sys.modules["soak_server_load"]


def test_a_sound_server_gives_no_problem(
    soak: Any, callers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "SAMPLE_S", 0.2)
    monkeypatch.setattr(callers, "SUPERSEDE_EVERY", 2)
    with process(tmp_path, token_s=0.003) as server:
        files = soak.open_files(server.popen.pid)
        # A busy machine is no reason to fail: ten minutes.
        seen, metrics = asyncio.run(soak.load(server.url, 3, 1.0, server.popen.pid, least=3, deadline_s=600.0))
        waits = soak.mean_waits(metrics)
    assert seen.problems == []
    assert seen.streams >= 6 and seen.streams_without_end == 0
    assert seen.superseding == 3 and seen.superseded_won == 0
    assert seen.superseded_cancelled > seen.superseded_swapped
    assert set(waits) == {"act", "verify", "ask"} and seen.cycle_s and seen.first_row_s and seen.memory_mb
    assert seen.outcomes["/actions done"] == 3 and all(seen.queue_s.values())
    serious = [text for text in soak.judge(seen, {}, 0, (files, files)) if "healthz" not in text]
    assert serious == []


def _acted(callers: Any, answer: Callable[[httpx.Request], httpx.Response], path: str = "/cycle") -> Any:
    """What is seen of one streamed request to a server that answers so."""

    async def work() -> Any:
        seen = callers.Seen()
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as client:
            await callers.act(client, seen, path, {"image": "", "subtask": "Move", "episode_id": "robot-0"})
        return seen

    return asyncio.run(work())


ROW = {"event": "row", "index": 0, "row": [0.0, 0.0, 0.0, 1.0]}
DONE = {"event": "done", "timing_ms": {"queue": 1500.0}}
CANCELLED = {"event": "error", "error": {"code": "cancelled"}}


@pytest.mark.parametrize(
    ("events", "bad"),
    [
        ([ROW, DONE], 0),
        ([ROW, CANCELLED], 0),
        ([], 1),
        ([ROW], 1),
        ([ROW, DONE, DONE], 1),
        ([ROW, DONE, CANCELLED], 1),
        ([DONE, ROW], 1),
    ],
)
def test_a_stream_needs_exactly_one_end_and_it_is_the_last_line(
    soak: Any, callers: Any, events: list[dict[str, Any]], bad: int
) -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    seen = _acted(callers, lambda _: httpx.Response(200, text=text))
    assert seen.streams == 1 and seen.streams_without_end == bad
    assert ("no end" in " ".join(soak.judge(seen, {}, 0, (1, 1)))) is bool(bad)
    assert seen.queue_s["act"] == ([1.5] * events.count(DONE))


@pytest.mark.parametrize(
    ("status", "code", "fine"),
    [(499, "cancelled", True), (200, "", True), (503, "cancelled", False), (499, "overloaded", False)],
)
def test_a_cancelled_cycle_is_a_499(callers: Any, status: int, code: str, fine: bool) -> None:
    body = {"error": {"code": code}} if code else DONE
    seen = _acted(callers, lambda _: httpx.Response(status, json=body))
    assert (seen.problems == []) is fine, seen.problems


def test_an_older_cycle_that_outlives_the_newer_is_found(soak: Any, callers: Any) -> None:
    """Of two cycles of an episode, the first to arrive answers last, as if nothing had cancelled it."""
    arrived = 0

    async def answer(_: httpx.Request) -> httpx.Response:
        nonlocal arrived
        arrived += 1
        await asyncio.sleep(2.0 if arrived == 1 else 0.0)
        return httpx.Response(200, json=DONE)

    async def work() -> Any:
        seen = callers.Seen()
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as client:
            await callers.superseded_cycle(client, seen, "robot-0", callers.random.Random(0))
        return seen

    seen = asyncio.run(work())
    assert (seen.superseding, seen.superseded_won, seen.superseded_cancelled) == (1, 1, 0)
    assert "1 older cycles finished" in " ".join(soak.judge(seen, {}, 0, (1, 1)))


def test_a_verdict_that_waits_less_than_a_cycle_is_found(soak: Any) -> None:
    seen = soak.Seen()
    seen.queue_s |= {"act": [2.0, 3.0], "verify": [1.0], "ask": [9.0]}
    found = " ".join(soak.judge(seen, {}, 0, (1, 1)))
    assert "median waits of the callers" in found and "mean waits of the server" not in found


def test_growth_compares_the_end_with_what_follows_the_warm_up(soak: Any) -> None:
    flat = [(float(at), 500.0 if at > 20 else 300.0 + 10 * at) for at in range(100)]
    assert soak.growth_mb(flat) == 0.0
    leak = [(float(at), 500.0 + at) for at in range(100)]
    assert 40 < soak.growth_mb(leak) < 60
    assert soak.slope_mb_per_min(flat) == pytest.approx(0.0) and soak.slope_mb_per_min(leak) == pytest.approx(60.0)


def test_what_does_not_hold_is_named(soak: Any) -> None:
    seen = soak.Seen(streams_without_end=1, superseding=3, superseded_won=1, health_s=[2.0])
    seen.memory_mb = [(float(at), 500.0 + at) for at in range(100)]
    found = " ".join(soak.judge(seen, {"act": 2.0, "verify": 1.0, "ask": 3.0}, 1, (10, 100)))
    words = (
        "no end",
        "1 older cycles finished",
        "older cycles were not cancelled",
        "memory",
        "order",
        "/healthz",
        "no cycle",
        "SIGTERM",
        "files",
    )
    for word in words:
        assert word in found, word


def test_the_table_shows_every_kind_and_the_problems(soak: Any) -> None:
    seen = soak.Seen(cycle_s=[1.0])
    seen.queue_s["act"] = [0.5]
    shown = soak.table({**soak.report(seen, "", 3, (1, 1)), "load_average": [1.0, 2.0]})
    for words in ("wait of act", "wait of verify", "wait of ask", "the server ended with 3 on SIGTERM"):
        assert words in shown
