"""Other people's policies behind the Policy Protocol: OpenVLA, ECoT, MolmoAct and pi-0.5 (section 4).

They name no subtasks, so the task is the only one. What they answer are rows of BridgeData V2:
[dx_m, dy_m, dz_m, droll_rad, dpitch_rad, dyaw_rad, gripper], in the robot's base frame, the turn being
Rz(yaw) Ry(pitch) Rx(roll) about the end effector (github.com/rail-berkeley/bridge_data_robot, transformation_utils.py,
``action2transform_local``). That is the safety filter's row of seven numbers; only the gripper, a number of which more
than 0.5 opens, becomes 1 or 0.

A policy of single steps sees every step's picture, and the verifier is asked after ``ROWS_PER_VERDICT`` of them, a
second at Bridge's 5 Hz: 12 cycles are 60 steps, the ``max_steps`` of OpenVLA's own evaluation. Of a longer chunk as
many rows are executed and the rest is dropped for a fresh picture, as openpi's own clients do (``replan_steps``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import AnswerUnusableError, ProtocolMismatchError, ServerUnreachableError
from vlm2vla_client.policies.base import (
    Answered,
    Asked,
    CycleEvent,
    PlanArrived,
    PolicyInfo,
    RowArrived,
    Scenario,
    SubtasksAnswer,
)
from vlm2vla_client.safety_types import RobotState
from vlm2vla_schema.images import to_model_square
from vlm2vla_schema.types import Frame
from vlm2vla_twin.kinematics import DOWN

ROW_WIDTH = 7
ROWS_PER_VERDICT = 5
MAX_ROWS = 256
HELLO_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Look:
    """What a peer is asked with.

    Attributes:
        image: uint8 [S, S, 3], RGB, squashed to the peer's own size as Bridge's frames were.
        state: float32 [7], the measured pose as Bridge records it; None when nobody measured.
    """

    image: NDArray[np.uint8]
    instruction: str
    state: NDArray[np.float32] | None


@dataclass(frozen=True)
class Said:
    """What a peer answered: float64 [N, 7] or [7], and the reasoning beside it if there was any."""

    actions: NDArray[np.float64]
    reasoning: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Peer(Protocol):
    """Somebody else's policy server. Calls block within the seconds they are given."""

    @property
    def name(self) -> str: ...

    @property
    def image_size(self) -> int:
        """Side of the square that the model was trained with, pixels."""
        ...

    def hello(self, timeout_s: float) -> dict[str, Any]:
        """What is worth recording about the server.

        Raises:
            PolicyError: nobody answers.
        """
        ...

    def act(self, look: Look, deadline_s: float) -> Said:
        """One answer.

        Raises:
            PolicyError: none, or not one of this protocol.
        """
        ...

    def alive(self, timeout_s: float) -> bool:
        """True when the server answers in time. Never raises."""
        ...

    def close(self) -> None:
        """Frees the connection; may be called twice."""
        ...


def bridge_rows(actions: NDArray[np.float64]) -> list[list[float]]:
    """Rows of seven numbers as the safety filter reads them, gripper 1 or 0.

    Raises:
        ProtocolMismatchError: not [7] or [N, 7] with 1 to 256 rows.
        AnswerUnusableError: a number is not finite.
    """
    rows = actions[None] if actions.ndim == 1 else actions
    if rows.ndim != 2 or rows.shape[1] != ROW_WIDTH or not 1 <= len(rows) <= MAX_ROWS:
        raise ProtocolMismatchError(
            f"expected actions of shape [{ROW_WIDTH}] or [N, {ROW_WIDTH}] (Bridge: x, y, z, roll, pitch, yaw, "
            f"gripper), received {list(actions.shape)}",
            code="bad_shape",
        )
    if not np.isfinite(rows).all():
        raise AnswerUnusableError("an action holds a number that is not finite", code="not_finite")
    return [[*(float(value) for value in row[:6]), 1.0 if row[6] > 0.5 else 0.0] for row in rows]


def bridge_state(state: RobotState) -> NDArray[np.float32]:
    """[x_m, y_m, z_m, roll_rad, pitch_rad, yaw_rad, gripper] as BridgeData V2 records a pose.

    Its angles are those of the turn away from the gripper straight down (bridge_data_robot, ``transform2state``), so
    that the usual pose is three zeros and not the singular one.
    """
    turn = np.asarray(state.ee_rotation, dtype=np.float64) @ DOWN.T
    roll, yaw = np.arctan2(turn[2, 1], turn[2, 2]), np.arctan2(turn[1, 0], turn[0, 0])
    pitch = np.arcsin(np.clip(-turn[2, 0], -1.0, 1.0))
    return np.array([*state.ee_position_m, roll, pitch, yaw, state.gripper], dtype=np.float32)


class BaselinePolicy:
    """A peer as a Policy.

    Args:
        peer: closed with this policy.
        plans: its answers carry reasoning, so it is scored as a planning policy (D.1).
        chunks: it answers with several rows, of which ``ROWS_PER_VERDICT`` are executed.
    """

    def __init__(self, peer: Peer, *, plans: bool = False, chunks: bool = False) -> None:
        self.name = peer.name
        self._peer = peer
        self._stages = ("motion_plan", "actions") if plans else ("actions",)
        self._steps_per_verdict = 1 if chunks else ROWS_PER_VERDICT
        self._info: PolicyInfo | None = None

    def info(self) -> PolicyInfo:
        """Asks the server for a sign of life, once. What these models were trained for is to act."""
        if self._info is None:
            details = self._peer.hello(HELLO_TIMEOUT_S)
            self._info = PolicyInfo(self.name, True, self._stages, details, self._steps_per_verdict)
        return self._info

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """The task itself."""
        return SubtasksAnswer([task])

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """Asks once. An operator's motion plan is not passed on: these models take none."""
        state = None if asked.state is None else bridge_state(asked.state)
        look = Look(to_model_square(frame.image, self._peer.image_size), subtask, state)
        said = self._peer.act(look, asked.deadline_s)
        rows = bridge_rows(said.actions)[:ROWS_PER_VERDICT]
        if said.reasoning is not None:
            yield PlanArrived(said.reasoning)
        for index, row in enumerate(rows):
            yield RowArrived(index, row, asked.episode_id)
        raw = {"raw_text": said.reasoning or "", "actions": said.actions.tolist(), **said.more}
        yield Answered(rows, said.reasoning, asked.episode_id, raw)

    def alive(self, timeout_s: float) -> bool:
        """The server's."""
        return self._peer.alive(timeout_s)

    def close(self) -> None:
        """Closes the connection."""
        self._peer.close()


def silent(url: str) -> ServerUnreachableError:
    """Nobody is at ``url``."""
    return ServerUnreachableError(f"nobody answers at {url}; is the baseline's own server running?", code="connect")
