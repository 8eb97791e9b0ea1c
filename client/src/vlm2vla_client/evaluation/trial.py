"""One trial: an episode in the twin whose events stay in memory, turned into a line of ``trials.jsonl``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.errors import RecordingStoppedError, ServerError
from vlm2vla_client.evaluation.options import EvalOptions
from vlm2vla_client.evaluation.trials import Trial
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.policies.base import Policy, PolicyInfo
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import Recorder, new_episode_folder
from vlm2vla_client.scenes import SceneChoice
from vlm2vla_client.sim import SimBench, SimRequest, make_policy, make_verifier, of_this_episode, run_parts
from vlm2vla_schema.types import Frame
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import SUITES

PolicyMaker = Callable[[SimRequest, World], Policy]
ANSWER_LIMIT_S = 120.0
"""Trials stand still while the policy thinks: a slow or crowded computer must not end its answers at an arm's 15 s
(the paper's slowest cycle took 48.8 s). How long they took stands in ``cycle_seconds``."""
_KEPT = ("request", "answer", "error", "verdict", "decision", "chunk")
# The policy's own fault: it counts as a failed trial. Any other server error says nothing about the policy.
_POLICY_FAULTS = ("AnswerUnusableError",)


class ServerFailedError(ServerError):
    """The server, not the policy's answer, ended a trial: the trial must not be counted."""


class EventTape(Recorder):
    """A recorder that keeps the few events a trial's line is made of, and no pictures and no files."""

    keeps_frames = False

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._count = 0

    def event(self, kind: str, **fields: Any) -> None:
        """Keeps requests, answers, errors, verdicts, decisions and how chunks ended."""
        if kind in _KEPT:
            self.events.append({"t_s": time.monotonic(), "event": kind, **fields})

    def frame(self, frame: Frame) -> int:
        """Numbers the frame; the picture is not kept."""
        self._count += 1
        return self._count - 1

    def limits(self, limits: Any) -> None:
        """Nothing is kept."""

    def summary(self, summary: Any) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing to close."""


class FullTape(Recorder):
    """A full recording on disk that also keeps the events of the trial's line."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        """Writes the event and keeps it if the trial's line needs it."""
        now_s = time.monotonic()
        super().event(kind, **fields)
        if kind in _KEPT:
            self.events.append({"t_s": now_s, "event": kind, **fields})


def run_trial(
    options: EvalOptions,
    suite_name: str,
    seed: int,
    connection: ServerConnection | None,
    *,
    commit: str | None = None,
    maker: PolicyMaker = make_policy,
) -> Trial:
    """Runs one trial to its end; blocks.

    Args:
        maker: gives the policy of a trial; replace it to measure a policy of one's own.

    Raises:
        ServerFailedError: the server could not be reached or broke down; the trial says nothing about the policy.
        ClientError: the twin could not be set up.
    """
    suite = SUITES[suite_name]
    task, spec = suite.instruction(seed), suite.scene(seed, options.mode)
    request = SimRequest(
        task=task,
        choice=SceneChoice(suite_name, spec, suite.scenario, suite, seed),
        policy=options.policy,
        verifiers=options.verifiers,
        connection=connection,
        model=options.model,
        policy_server=options.policy_server,
        unnorm_key=options.unnorm_key,
        max_cycles=options.max_cycles,
        max_cycles_per_subtask=0,
        animate=False,
        limits={"max_answer_age_s": ANSWER_LIMIT_S},
    )
    tape: EventTape | FullTape = EventTape()
    if options.record:
        tape = FullTape(new_episode_folder(options.out / "episodes", f"{suite_name} {seed}"))
    bench = SimBench.open(request.choice, request.limits, realtime=False, simulated=True)
    try:
        policy, verifier = maker(request, bench.world), make_verifier(request, bench)
        with of_this_episode(request, policy):
            info = policy.info()
            result = run_parts(request, bench, policy, verifier, tape, SilentProgress())
    finally:
        bench.close()
    _refuse_interruption(result, tape.events)
    return _line(options, request, info, result, tape.events, commit)


def _refuse_interruption(result: EpisodeResult, events: Sequence[Mapping[str, Any]]) -> None:
    if result.outcome == "interrupted":
        raise KeyboardInterrupt
    last: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "error"), {})
    if last.get("type") == RecordingStoppedError.__name__:
        raise RecordingStoppedError(result.message)
    if result.outcome != "server":
        return
    if last.get("type") not in _POLICY_FAULTS:
        raise ServerFailedError(f"{last.get('type', 'server error')}: {result.message}")


def _line(
    options: EvalOptions,
    request: SimRequest,
    info: PolicyInfo,
    result: EpisodeResult,
    events: Sequence[Mapping[str, Any]],
    commit: str | None,
) -> Trial:
    physics = result.physics or {}
    seconds, retried = cycle_seconds(events)
    spec = request.choice.spec
    return Trial(
        suite=request.choice.name,
        task=request.task,
        seed=request.choice.seed,
        mode=options.mode,
        policy=options.policy,
        model=info.name,
        verifier=",".join(options.verifiers),
        planning="motion_plan" in info.stages,
        score=physics["score"],
        max_score=physics["max_score"],
        planning_score=physics["planning_score"],
        non_planning_score=physics["non_planning_score"],
        plan_credit=physics["plan_credit"],
        success=physics["success"],
        verified=result.verified,
        failure=failure_of(physics["success"], physics["flags"], result.outcome),
        flags=physics["flags"],
        outcome=result.outcome,
        message=result.message,
        cycles=result.cycles,
        seconds=result.seconds,
        subtasks=result.subtasks,
        plans=result.plans,
        subtasks_done=result.subtasks_done,
        rows_executed=result.rows_executed,
        rows_changed=result.rows_changed,
        rows_refused=result.rows_refused,
        cycle_seconds=seconds,
        verify_seconds=[round(float(event["seconds"]), 4) for event in events if event["event"] == "verdict"],
        retried_cycles=retried,
        retries=0,
        commit=commit,
        finished_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        refusals=dict(
            Counter(
                str(reason)
                for event in events
                if event["event"] == "decision" and event["verdict"] == "refuse"
                for reason in event["reasons"]
            )
        ),
        chunks=dict(Counter(str(event["outcome"]) for event in events if event["event"] == "chunk")),
        start={"objects": {item.name: item.position_m for item in spec.objects}, **spec.extra},
    )


_MISSING = {"contact": "no_contact", "grasped": "not_grasped", "placed": "not_placed", "lifted": "not_lifted",
            "toward": "not_toward"}  # fmt: skip
_FAULTS = {"server": "unusable_answer", "safety_stop": "safety_stop", "camera": "camera", "robot": "robot",
           "failed": "error"}  # fmt: skip


def failure_of(success: bool, flags: Mapping[str, bool], outcome: str) -> str | None:
    """Why a trial is not a success: the fault that ended it, or the first stage that physics never saw."""
    if success:
        return None
    if outcome in _FAULTS:
        return _FAULTS[outcome]
    missing = next((name for name, reached in flags.items() if not reached), "")
    stage, _, thing = missing.partition("_")
    return _MISSING.get(stage, "unknown") + (f"_{thing}" if thing else "")


def cycle_seconds(events: Sequence[Mapping[str, Any]]) -> tuple[list[float], int]:
    """Wall seconds of every inference cycle, and how many of them needed more than one sample or failed.

    A cycle is the generation of motion plan and rows, as in appendix D.6; the server's own retries are inside.
    """
    seconds: list[float] = []
    retried, asked_s = 0, None
    for event in events:
        if event["event"] == "request" and event.get("stage") == "cycle":
            asked_s = float(event["t_s"])
        elif asked_s is not None and event["event"] == "answer":
            seconds.append(round(float(event["t_s"]) - asked_s, 6))  # wall time: a trial's own clock stands still
            retried += _sampled_again(event.get("answer"))
            asked_s = None
        elif asked_s is not None and event["event"] == "error" and event.get("where") == "cycle":
            seconds.append(round(float(event["t_s"]) - asked_s, 6))
            retried += 1
            asked_s = None
    return seconds, retried


def _sampled_again(answer: Any) -> bool:
    if not isinstance(answer, Mapping):
        return False
    stages = answer.get("stages")
    parts = list(stages.values()) if isinstance(stages, Mapping) else [answer]
    return any(isinstance(part, Mapping) and int(part.get("attempts", 1)) > 1 for part in parts)
