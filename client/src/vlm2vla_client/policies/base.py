"""What a policy is: the three stages of section 3.1 behind one Protocol.

The loop asks once for the subtasks, then, cycle by cycle, for a motion plan and rows. Rows arrive one by one, so that
``--execute streamed`` may start before the list is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlm2vla_client.safety_types import RobotState
from vlm2vla_schema.types import Frame, Scenario

__all__ = [
    "ALL_STAGES",
    "Answered",
    "Asked",
    "CycleEvent",
    "PlanArrived",
    "Policy",
    "PolicyInfo",
    "RowArrived",
    "RowDropped",
    "Scenario",
    "SubtasksAnswer",
]

ALL_STAGES = ("subtasks", "motion_plan", "actions")


@dataclass(frozen=True)
class PolicyInfo:
    """What a policy says about itself before anything moves.

    Attributes:
        name: policy or model name, for people and for the recording.
        trained_to_act: the card's ``policy`` field; a physical arm refuses a policy where it is False.
        stages: which of the three stages it has; ("actions",) for the -NR variants.
        details: what else is worth recording (adapters and their hashes, engine, versions).
        steps_per_verdict: how many pictures it acts on before a verifier is asked; more than 1 for policies of single
            steps, which would else be judged on every centimetre.
    """

    name: str
    trained_to_act: bool
    stages: tuple[str, ...] = ALL_STAGES
    details: dict[str, Any] = field(default_factory=dict)
    steps_per_verdict: int = 1


@dataclass(frozen=True)
class Asked:
    """Who is asking, for logs, for seeds and for telling answers apart.

    Attributes:
        episode_id: rows of another episode are dropped.
        seed: base seed of this request, or None to leave it to the policy.
        deadline_s: seconds from now within which the answer must be complete.
        motion_plan: the operator's; the policy's rows follow it instead of a plan of its own.
        state: the arm as it was when the frame was taken, for policies that were trained with it; ours is not.
    """

    episode_id: str
    deadline_s: float
    seed: int | None = None
    motion_plan: str | None = None
    state: RobotState | None = None


@dataclass(frozen=True)
class SubtasksAnswer:
    """The subtasks of the rollout. ``raw`` is the whole answer, for the recording."""

    subtasks: list[str]
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanArrived:
    """The motion plan of this cycle."""

    motion_plan: str


@dataclass(frozen=True)
class RowArrived:
    """One row [dx_m, dy_m, dz_m, gripper] of this answer's chunk, or a baseline's seven numbers
    [dx_m, dy_m, dz_m, droll_rad, dpitch_rad, dyaw_rad, gripper]; ``episode_id`` is the one it was computed for."""

    index: int
    row: list[float]
    episode_id: str


@dataclass(frozen=True)
class RowDropped:
    """A row that arrived but does not belong to this answer; it never moves the arm."""

    reason: str
    row: Any


@dataclass(frozen=True)
class Answered:
    """The end of a good answer: every row of it, and the whole answer for the recording."""

    rows: list[list[float]]
    motion_plan: str | None
    episode_id: str
    raw: dict[str, Any] = field(default_factory=dict)


CycleEvent = PlanArrived | RowArrived | RowDropped | Answered


class Policy(Protocol):
    """Anything that turns a frame into words and rows. Methods block, within the deadline they are given."""

    @property
    def name(self) -> str: ...

    def info(self) -> PolicyInfo:
        """Who answers.

        Raises:
            PolicyError: nobody does, or it speaks another protocol.
        """
        ...

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """The subtasks, from the first frame (temperature by scenario, D.4).

        Raises:
            PolicyError: no usable answer.
        """
        ...

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """Motion plan (the operator's, when ``asked`` has one), then rows, then exactly one ``Answered``.

        Raises:
            PolicyError: while iterating; rows already yielded belong to a failed answer.
        """
        ...

    def alive(self, timeout_s: float) -> bool:
        """True when whoever answers is still there; asked from a second thread while the arm moves. Never raises."""
        ...

    def close(self) -> None:
        """Frees connections; may be called twice."""
        ...
