"""bench/execution_jitter.py: the figures are what they say; how large they are, the benchmark prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_programs import program


@pytest.fixture
def bench() -> Iterator[Any]:
    with program("execution_jitter") as module:
        yield module


def test_what_is_beyond_the_commanded_motion_is_counted(bench: Any) -> None:
    # Rows of two substeps of 0.1 s; the second of each follows 3 ms late, the next row another 2 ms later.
    commands, events = [], []
    for number in range(16):
        commands += [(0.205 * number, 0.1), (0.205 * number + 0.103, 0.1)]
        events += [{"event": "decision"}, {"event": "substep"}, {"event": "step"}, {"event": "substep"}]
    found = bench.timings(commands, events)
    assert (found["rows"], found["substeps"]) == (16, 32)
    assert found["jitter_ms"]["p99"] == pytest.approx(3.0) and found["over_a_row_ms"]["p50"] == pytest.approx(5.0)


def test_an_episode_is_measured(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = bench.measure(1)
    assert found["outcome"] == "executed" and found["rows"] == bench.ROWS_A_CHUNK
    assert found["substeps"] > found["rows"] and found["over_a_row_ms"]["p10"] > 0.0
