"""What is noted down while the arm moves, and that nothing there keeps the arm waiting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from client_fakes import FakeClock, FakeRobot

from vlm2vla_client.errors import CameraError
from vlm2vla_client.moves import Moves
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import Recorder, read_episode
from vlm2vla_client.safety import Limits
from vlm2vla_schema.types import Frame

LIMITS = Limits(counter_z_m=0.0, wall_x_m=0.56, max_joint_speed_rad_s=3.14)


@dataclass
class FrozenCamera:
    """Its last picture is too old; whoever asks waits as long as they said they would, then is told so."""

    clock: FakeClock
    waited_s: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Nothing to open."""

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        self.waited_s.append(timeout_s)
        self.clock.sleep_s(timeout_s)
        raise CameraError(f"no picture that is new enough within {timeout_s:.2f} s")

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        return self.latest(0.0, timeout_s)

    def close(self) -> None:
        """Nothing to close."""


def test_a_frozen_camera_keeps_no_row_and_no_substep_waiting(tmp_path: Path) -> None:
    """The executor looks at keys and faults between these calls: waiting here, it held 0.94 s after a frozen camera."""
    clock = FakeClock()
    robot, camera, tape = FakeRobot(clock), FrozenCamera(clock), Recorder(tmp_path / "episode")
    moves = Moves(tape, SilentProgress(), robot, camera, LIMITS, display=lambda frame, caption: None)
    began_s = clock.now_s()
    row = [0.01, 0.0, 0.0, 1.0]
    moves("row", {"index": 0, "row": row, "allowed": row, "verdict": "pass", "reasons": [], "ends_chunk": False})
    moves("substep", {"step": 1, "of": 1, "duration_s": 0.1, "ee_position_m": [0.3, 0.0, 0.1]})
    moves("arrival", {"arrived": True, "error_m": 0.0, "waited_s": 0.0})
    tape.close()
    assert camera.waited_s == [0.0] * 3 and clock.now_s() == began_s
    found = [event["event"] for event in read_episode(tmp_path / "episode").events]
    assert "step_unseen" in found and "error" in found, "what was not seen stands in the recording"
