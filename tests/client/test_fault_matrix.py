"""The fault matrix: whole episodes, each with one fault, end as they should, move no further, and can be read.

Here are the faults that no other test meets in a whole episode over real sockets, processes and disks. Times are
printed by bench/fault_matrix.py and judged there; tests of the deadlines themselves stand beside each part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from bench_programs import program

FAULTS = [
    "server killed", "server half-open", "server stalled 5 s", "corrupt JSON", "rows reordered", "rows twice",
    "camera frozen", "camera gone", "arm moved since capture", "no IK solution", "disk full", "Gemini: blocked answer",
    "heartbeat lost",
]  # fmt: skip


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("GEMINI_API_KEY", "set again by the matrix")  # so that it is put back
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", "")
    with program("fault_matrix") as module:
        yield module


@pytest.fixture(scope="module")
def late() -> list[Any]:
    """The thread that is started once."""
    return []


@pytest.mark.parametrize("fault", FAULTS)
def test_an_episode_with_a_fault(matrix: Any, late: list[Any], fault: str) -> None:
    if not late:
        late.append(matrix.Lateness())
        late[0].start()
    (row,) = matrix.run(matrix.cases(), [fault], late[0])
    # Not the times: a computer that is busy with other tests is late by itself.
    assert [problem for problem in row.problems if not problem.startswith("held after")] == []
    assert row.readable and row.rows_after == 0 and row.observed_s is not None
    assert (row.hold_s is None) == (row.limit_s is None)


def test_every_fault_that_the_design_names_is_there(matrix: Any) -> None:
    names = set(matrix.cases())
    wanted = {
        *FAULTS, "answer late", "motor overload", "arm process killed", "arm process silent", "client killed",
        "second client", "disk below the floor", *(f"operator's key, {moment}" for moment in matrix.KEY_MOMENTS),
        *(f"Gemini: {reply}" for reply in ("429", "500", "invalid JSON", "timeout")),
    }  # fmt: skip
    assert wanted <= names


def test_rows_that_start_after_the_fault_are_counted_until_something_is_planned_anew(matrix: Any) -> None:
    events = [{"event": kind} for kind in ("request", "decision", "fault", "decision", "step", "request", "decision")]
    assert matrix.rows_after(events, 2) == 2 and matrix.rows_after(events, 4) == 0


def test_a_row_says_what_did_not_hold(matrix: Any) -> None:
    good = matrix.Row("f", "moving", hold_s=0.3, limit_s=0.25, lateness_s=0.1, exit_code=4)
    good.judge((4,))
    assert good.problems == []
    bad = matrix.Row("f", "moving", hold_s=0.4, limit_s=0.25, rows_after=1, exit_code=0)
    bad.judge((4,))
    assert len(bad.problems) == 3
    assert "| f | moving | - | 0.40 | 0.25 | 1 | 0 | yes |" in matrix.markdown([bad])
