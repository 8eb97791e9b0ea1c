"""What the executor reports while it moves, turned into the recording, the live display and the episode's animation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.errors import ClientError
from vlm2vla_client.progress import Progress, printable
from vlm2vla_client.recorder import Recorder
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.safety import Decision, Limits, RobotState, SafetyContext, filter_row
from vlm2vla_schema.types import Frame

STEP_FRAME_AGE_S = 0.5


def state_of(state: RobotState) -> list[float]:
    """[x, y, z, roll, pitch, yaw, gripper] of a measured state: metres, radians, 1 open .. 0 closed."""
    rotation = np.asarray(state.ee_rotation, dtype=np.float64)
    roll = math.atan2(rotation[2, 1], rotation[2, 2])
    pitch = math.asin(min(max(-float(rotation[2, 0]), -1.0), 1.0))
    yaw = math.atan2(rotation[1, 0], rotation[0, 0])
    return [*(float(v) for v in state.ee_position_m), roll, pitch, yaw, float(state.gripper)]


def action_of(row: Sequence[float]) -> list[float]:
    """A row of 4 or 7 numbers as [dx, dy, dz, droll, dpitch, dyaw, gripper]."""
    return [*row[:3], 0.0, 0.0, 0.0, row[3]] if len(row) == 4 else [float(v) for v in row]


@dataclass(frozen=True, eq=False)
class _Step:
    """A row that may move, and what was known when it was taken."""

    index: int
    state: RobotState
    action: list[float]
    frame: Frame | None


class Moves:
    """The executor's ``on_event``.

    Every row that may move is recorded as a ``step``: the newest frame, the arm's state and the action, so that
    recordings can be read back as training episodes. Called in the executor's thread, which looks at no key and no
    fault meanwhile, so nothing waits here for a camera: a picture that is not there is recorded as missing.

    Args:
        display: called with a frame and a caption at every substep, for the animation; None to leave it out.
    """

    def __init__(
        self,
        recorder: Recorder,
        progress: Progress,
        robot: Robot,
        camera: Camera,
        limits: Limits,
        display: Callable[[Frame, str], None] | None = None,
    ) -> None:
        self._recorder = recorder
        self._progress = progress
        self._robot = robot
        self._camera = camera
        self._limits = limits
        self._display = display
        self._cycle = 0
        self._subtask_index = 0
        self._caption = ""
        self._row = 0
        self._step: _Step | None = None
        self.counts: Counter[str] = Counter()

    def begin(self, cycle: int, subtask_index: int, caption: str = "") -> None:
        """The cycle and subtask that the coming events belong to; ``caption`` goes under the animation's pictures."""
        self._cycle, self._subtask_index, self._caption = cycle, subtask_index, printable(caption)

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """One event of the executor."""
        self._write_step()
        if kind == "row":
            self._on_row(data)
        elif kind == "substep":
            self._on_substep(data)
        else:
            self._event(kind, **data)
            if kind in ("arrival", "gripper"):
                self._picture()

    def preview(self, rows: Iterable[Sequence[float]], context: SafetyContext, state: RobotState) -> None:
        """Dry run: what the filter says about the first row from here; later rows depend on motion that will not be."""
        for index, row in enumerate(rows):
            if index:
                self._progress.decision(index, row, "not executed", ["dry_run"])
                continue
            decision = filter_row(row, state, context, self._limits)
            self._decided(index, list(row), decision)

    def _decided(self, index: int, row: list[float], decision: Decision) -> None:
        reasons = [str(reason) for reason in decision.reasons]
        self._event(
            "decision",
            index=index,
            row=row,
            allowed=decision.row,
            verdict=decision.verdict,
            reasons=reasons,
            ends_chunk=decision.ends_chunk,
            dry_run=True,
        )
        self._progress.decision(index, row, decision.verdict, reasons)

    def _on_row(self, data: dict[str, Any]) -> None:
        self._row = int(data["index"])
        self._event("decision", **data)
        self._progress.decision(self._row, data["row"], data["verdict"], data["reasons"])
        self.counts["changed"] += data["verdict"] == "clip"
        if data["allowed"] is None:
            self.counts["refused"] += 1
            return
        self.counts["executed"] += 1
        self._step = _Step(self._row, self._robot.state(), action_of(data["allowed"]), self._step_frame())
        if not any(self._step.action[:6]):
            self._write_step()

    def _write_step(self) -> None:
        """The row that was taken last, as it was then; encoding its picture need not keep the arm waiting."""
        step, self._step = self._step, None
        if step is None:
            return
        frame = None if step.frame is None else self._recorder.frame(step.frame)
        self._event(
            "step" if frame is not None else "step_unseen",
            index=step.index,
            frame=frame,
            state=state_of(step.state),
            action=step.action,
            position_m=step.state.ee_position_m,
        )

    def _step_frame(self) -> Frame | None:
        if not self._recorder.keeps_frames and self._display is None:
            return None  # nobody would ever see the picture
        try:
            frame = self._camera.latest(STEP_FRAME_AGE_S, 0.0)
        except ClientError as error:
            self._event("error", where="step frame", type=type(error).__name__, message=str(error))
            return None
        self._show(frame)
        return frame

    def _on_substep(self, data: dict[str, Any]) -> None:
        self._event("substep", index=self._row, position_m=data["ee_position_m"], **data)
        self._picture()

    def _picture(self) -> None:
        if self._display is not None:
            try:
                self._show(self._camera.latest(STEP_FRAME_AGE_S, 0.0))
            except ClientError:
                return  # an animation with a missing picture is no reason to stop

    def look(self, frame: Frame) -> None:
        """A picture that somebody else took (for the policy, for the verifier); the animation wants it too."""
        self._show(frame)

    def _show(self, frame: Frame) -> None:
        if self._display is not None:
            self._display(frame, self._caption)

    def _event(self, kind: str, **fields: Any) -> None:
        self._recorder.event(kind, cycle=self._cycle, subtask_index=self._subtask_index, **fields)
