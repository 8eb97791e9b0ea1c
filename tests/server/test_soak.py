"""bench/soak_robots.py: that it finds nothing wrong with a sound server, and does find what is wrong."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_process import process

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("soak", "soak_robots"):
        sys.modules.pop(name, None)
    return importlib.import_module("soak_robots")


def test_a_sound_server_gives_no_problem(soak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SAMPLE_S", 0.2)
    monkeypatch.setattr(soak, "DEADLINE_MS", 600_000)  # a busy machine is no reason to fail
    monkeypatch.setattr(soak, "SUPERSEDE_EVERY", 2)
    with process(tmp_path, token_s=0.003) as server:
        files = soak.open_files(server.popen.pid)
        seen, metrics = asyncio.run(soak.load(server.url, 3, 1.0, server.popen.pid, least=2))
        waits = soak.mean_waits(metrics)
    assert seen.problems == []
    assert seen.streams >= 6 and seen.streams_without_end == 0
    assert seen.superseding == 3 and seen.superseded_won == 0
    assert seen.superseded_cancelled > seen.superseded_swapped
    assert set(waits) == {"act", "verify", "ask"} and seen.cycle_s and seen.first_row_s and seen.memory_mb
    serious = [text for text in soak.judge(seen, {}, 0, (files, files)) if "healthz" not in text]
    assert serious == []


def test_growth_compares_the_end_with_what_follows_the_warm_up(soak: Any) -> None:
    flat = [(float(at), 500.0 if at > 20 else 300.0 + 10 * at) for at in range(100)]
    assert soak.growth_mb(flat) == 0.0
    leak = [(float(at), 500.0 + at) for at in range(100)]
    assert 40 < soak.growth_mb(leak) < 60


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
