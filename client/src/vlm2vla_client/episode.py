"""The nouns of one episode: what is asked for, who takes part, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.clock import Clock
from vlm2vla_client.confirm import Confirm
from vlm2vla_client.executor import ChunkResult, MotionStart
from vlm2vla_client.moves import Moves
from vlm2vla_client.operator_keys import NoOperator, Operator
from vlm2vla_client.policies.base import Policy, Scenario
from vlm2vla_client.progress import Progress
from vlm2vla_client.recorder import Recorder
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.safety import SafetyContext
from vlm2vla_client.shadow import Shadow
from vlm2vla_client.verifiers.base import Verifier
from vlm2vla_client.watch import Watch


class ChunkRunner(Protocol):
    """The part of the executor that the loop needs."""

    def run_chunk(
        self,
        rows: Iterable[Sequence[float]],
        context: SafetyContext,
        start: MotionStart | Callable[[], MotionStart] | None = None,
    ) -> ChunkResult: ...

    def hold(self, reason: str) -> None: ...


@dataclass(frozen=True)
class LoopConfig:
    """One episode, as asked for.

    Attributes:
        scenario: sets the temperature of the subtasks stage (D.4).
        execute: "whole" moves after the complete answer, "streamed" row by row as they arrive.
        max_cycles_per_subtask: applies to policies that name subtasks; 0 for no limit.
        max_cycles: in all, each of as many as the policy's ``steps_per_verdict``; 0 for no limit of either kind (the
            paper's "until done").
        settle_s: the arm's rest between the last row and the verifier's picture.
        max_answer_age_s: also the deadline of a cycle's answer: an older one would be refused anyway.
        dry_run: ask, filter and record, but never move.
        recorded: what a replay needs (scene, seed, robot, ...), copied into the recording.
    """

    task: str
    episode_id: str
    scenario: Scenario = "out_of_distribution"
    execute: Literal["whole", "streamed"] = "whole"
    max_cycles_per_subtask: int = 5
    max_cycles: int = 30
    settle_s: float = 0.5
    max_answer_age_s: float = 15.0
    subtasks_deadline_s: float = 60.0
    verify_deadline_s: float = 60.0
    seed: int | None = None
    dry_run: bool = False
    recorded: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """Who does what in one episode; everything is connected and started already.

    Attributes:
        executor: its events must go to ``moves``.
        confirm: asked before every chunk; None never asks.
        operator: whose keys hold the arm; the executor's monitor must ask it too.
        shadow: moves every chunk first, to say what the arm would touch; None when nobody does.
        judge: what physics says at the end (the twin's tasks), for the summary.
    """

    policy: Policy
    robot: Robot
    camera: Camera
    verifier: Verifier
    executor: ChunkRunner
    moves: Moves
    watch: Watch
    clock: Clock
    recorder: Recorder
    progress: Progress
    confirm: Confirm | None = None
    operator: Operator = field(default_factory=NoOperator)
    shadow: Shadow | None = None
    judge: Callable[[str], dict[str, Any] | None] | None = None


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended; also written as ``summary.json``.

    Attributes:
        outcome: verified, executed (verifier ``none``), dry_run, not_completed, server, safety_stop, camera, robot,
            interrupted or failed.
        verified: every subtask was confirmed by a verifier that checks.
        success: by physics where there is a judge, else ``verified``.
        physics: score, max_score and success by the twin's judge, when there is one.
    """

    exit_code: int
    outcome: str
    message: str
    subtasks: list[str]
    subtasks_done: int
    cycles: int
    rows_executed: int
    rows_changed: int
    rows_refused: int
    seconds: float
    verified: bool
    success: bool
    plans: list[str]
    physics: dict[str, Any] | None = None
