"""bench/soak_twin.py: its monitor complains about what must not be, and about nothing else."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_programs import BENCH, program
from client_fakes import FakeClock, FakeRobot, make_frame

from vlm2vla_client.recorder import Recorder, read_episode


@pytest.fixture
def soak() -> Iterator[Any]:
    with program("soak_twin_episode") as module:
        yield module


class Desk:
    """A monitored arm that is always where it was."""

    def __init__(self, soak: Any, speed: float = 1.0) -> None:
        self.clock = FakeClock()
        self.faults = soak.Faults(self.clock.now_s)
        self.arm = soak.MonitoredRobot(FakeRobot(self.clock), self.faults, speed)
        state = self.arm.state()
        self.here, self.rotation = np.array(state.ee_position_m), np.array(state.ee_rotation)

    def command(self, shift_m: tuple[float, float, float], duration_s: float = 0.1) -> list[str]:
        """The complaints about a step from here."""
        self.arm.command(self.here + shift_m, self.rotation, duration_s)
        return list(self.arm.seen.complaints)


def test_what_the_executor_sends_passes(soak: Any) -> None:
    desk = Desk(soak)
    for shift in ((0.02, 0.0, 0.0), (0.0, -0.012, 0.012), (0.0, 0.0, 0.0)):
        assert desk.command(shift) == []
        desk.clock.sleep_s(0.1)
        desk.arm.hold("next from here")
    assert desk.arm.seen.commands == 3 and desk.arm.seen.held


@pytest.mark.parametrize(
    ("shift_m", "duration_s", "complaint"),
    [
        ((0.03, 0.0, 0.0), 0.1, "a step of 30.0 mm"),
        ((0.015, 0.0, 0.0), 0.05, "0.300 m/s"),
        ((float("nan"), 0.0, 0.0), 0.1, "not finite"),
        ((0.0, 0.0, 0.01), 0.2, "0.2 s long"),
        ((0.0, 0.0, 0.01), 0.0, "0.0 s long"),
        ((0.3, 0.0, 0.0), 0.1, "outside the box"),
        ((0.0, 0.0, -0.5), 0.1, "outside the box"),
    ],
)
def test_an_unsafe_command_is_named(
    soak: Any, shift_m: tuple[float, float, float], duration_s: float, complaint: str
) -> None:
    assert any(complaint in text for text in Desk(soak).command(shift_m, duration_s))


def test_the_episodes_speed_and_the_time_of_the_command_before_count(soak: Any) -> None:
    assert any("m/s" in text for text in Desk(soak, speed=0.5).command((0.02, 0.0, 0.0)))
    desk = Desk(soak)
    assert desk.command((0.01, 0.0, 0.0)) == []
    desk.clock.sleep_s(0.05)
    assert any("before the one before it has ended" in text for text in desk.command((0.0, 0.0, 0.0)))


def test_a_mirrored_rotation_is_none(soak: Any) -> None:
    desk = Desk(soak)
    desk.rotation = desk.rotation @ np.diag([1.0, 1.0, -1.0])
    assert any("not a rotation" in text for text in desk.command((0.0, 0.0, 0.0)))


def test_a_command_after_a_fault_is_late_from_its_limit_on(soak: Any) -> None:
    desk = Desk(soak)
    desk.faults.inject("camera frozen")
    desk.clock.sleep_s(importlib.import_module("soak_twin_faults").KINDS["camera frozen"].still_after_s - 0.01)
    desk.command((0.0, 0.0, 0.0))
    assert desk.arm.seen.late == []
    desk.clock.sleep_s(0.11)
    desk.command((0.0, 0.0, 0.0))
    assert [round(after_s, 2) for _, after_s in desk.arm.seen.late] == [0.85]
    assert not desk.arm.seen.held


def recorded(folder: Path, *events: tuple[str, dict[str, Any]]) -> Any:
    with Recorder(folder) as recorder:
        recorder.event("episode", task="t")
        number = recorder.frame(make_frame(1))
        for kind, fields in events:
            recorder.event(kind, **{"cycle": 1, **({"frame": number} if kind == "step" else {}), **fields})
        recorder.summary({"exit_code": 7})
    return read_episode(folder)


END: list[tuple[str, dict[str, Any]]] = [("error", {"where": "episode"}), ("end", {})]


def test_recordings_are_read_with_suspicion(soak: Any, tmp_path: Path) -> None:
    def problems(name: str, *events: tuple[str, dict[str, Any]]) -> str:
        return " ".join(soak.problems_of(recorded(tmp_path / name, *events), False))

    moved = [("decision", {"index": 0}), ("step", {}), ("substep", {})]
    assert problems("good", *moved, *END) == ""
    assert "motion after the fault" in problems("late", ("fault", {}), *moved, *END)
    assert problems("planned anew", *moved, ("fault", {}), ("request", {"cycle": 2}), ("step", {}), *END) == ""
    assert "executed twice" in problems("twice", *moved, *moved, *END)
    assert "ends in" in problems("cut", *moved)
    assert soak.problems_of(recorded(tmp_path / "killed", *moved), True) == []
    assert "are missing" in problems("lost", ("step", {"frame": 9}), *END)


def test_a_soak_of_one_episode(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(BENCH / "soak_twin.py"), "--minutes", "0.01", "--fault-every-s", "0"]
    command += ["--kind", "arm silent", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    result = json.loads(out.read_text())
    assert done.returncode == 0 and result["problems"] == [], done.stdout + done.stderr
    assert result["episodes"] == 1 and "problems: none" in done.stdout
    (line,) = result["lines"]
    if line["fault"] is not None:
        assert line["exit_code"] in (7, 6, 4, 0)
