"""Typed doubles for the client's seams: a scripted server behind httpx's own test transport, verifiers, frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np

from vlm2vla_client.clock import SystemClock
from vlm2vla_client.executor import ChunkResult, MotionStart, Outcome, RowResult
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.moves import Moves
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
from vlm2vla_client.robots.base import RobotCapabilities
from vlm2vla_client.safety import Decision, RobotState, SafetyContext
from vlm2vla_schema.errors import ErrorCode
from vlm2vla_schema.types import Frame, Verdict
from vlm2vla_twin.kinematics import forward

EPISODE = "episode-1"


def make_frame(number: int = 0, stamp_s: float = 0.0, size: tuple[int, int] = (48, 64)) -> Frame:
    """A small picture that differs from frame to frame."""
    image = np.full((*size, 3), (number * 37) % 256, dtype=np.uint8)
    image[: size[0] // 2] = 90
    return Frame(image=image, stamp_s=stamp_s, frame_id=f"f{number}")


def asked(deadline_s: float = 5.0, episode_id: str = EPISODE) -> Asked:
    """A request's identity."""
    return Asked(episode_id=episode_id, deadline_s=deadline_s, seed=7)


def info_body(**changes: Any) -> dict[str, Any]:
    """A valid /info with one adapter that was trained to act."""
    stages = changes.pop("stages", ["subtasks", "motion_plan", "actions"])
    policy = changes.pop("policy", True)
    card = {"name": "twin", "base_model": "base", "image_size": 112, "stages": stages, "policy": policy}
    body: dict[str, Any] = {
        "protocol": 1,
        "model": "twin",
        "policy": policy,
        "stages": stages,
        "adapters": [{"name": "twin", "hash": "abc", "policy": policy, "proven": True, "card": card}],
        "prompt_versions": {"actions": "d4"},
        "limits": {"max_row_translation_m": 0.1, "max_rows": 32, "max_body_mb": 16.0, "max_concurrency": 1},
        "units": {},
        "image_size": 112,
        "engine": "fake",
        "versions": {},
    }
    return {**body, **changes}


def stage(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What every generating answer carries, with the request's echoes."""
    return {
        "model": "twin",
        "policy": True,
        "prompt_version": "d4",
        "raw_text": "...",
        "attempts": 1,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0},
        "timing_ms": {"queue": 0.0, "preprocess": 0.0, "first_token": 0.0, "generate": 1.0, "total": 1.0},
        **{name: fields.get(name) for name in ("request_id", "episode_id", "frame_id")},
        **more,
    }


def cycle_lines(
    fields: dict[str, Any], rows: list[list[float]], plan: str | None = "move left"
) -> list[dict[str, Any]]:
    """The lines of a good stream: plan, rows, done."""
    lines: list[dict[str, Any]] = [] if plan is None else [{"event": "plan", "motion_plan": plan}]
    lines += [{"event": "row", "index": index, "row": row} for index, row in enumerate(rows)]
    done = stage(fields, event="done", actions=rows)
    if plan is not None:
        done.update(motion_plan=plan, stages={"motion_plan": stage(fields), "actions": stage(fields)})
    return [*lines, done]


def ndjson(lines: list[dict[str, Any]]) -> bytes:
    """The lines as bytes."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class ByteStream(httpx.SyncByteStream):
    """A body given piece by piece; an exception in the list is raised in its turn."""

    def __init__(self, pieces: list[bytes | Exception]) -> None:
        self._pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def close(self) -> None:
        self.closed = True


def stream_response(pieces: list[bytes | Exception]) -> httpx.Response:
    """A 200 NDJSON answer with these pieces."""
    return httpx.Response(200, headers={"content-type": "application/x-ndjson"}, stream=ByteStream(pieces))


def error_response(code: str, status: int | None = None, headers: dict[str, str] | None = None) -> httpx.Response:
    """An error answer as the protocol prescribes it."""
    body = {"error": {"code": code, "message": "no", "details": {"why": "test"}, "request_id": "r1"}}
    return httpx.Response(status or ErrorCode(code).http_status, json=body, headers=headers)


Handler = Callable[[httpx.Request], httpx.Response]


class FakeServer:
    """Answers by path; remembers every request. ``/info`` and ``/healthz`` work unless overridden."""

    def __init__(self, **handlers: Handler) -> None:
        self.requests: list[httpx.Request] = []
        self._handlers: dict[str, Handler] = {
            "info": lambda _: httpx.Response(200, json=info_body()),
            "healthz": lambda _: httpx.Response(200, json={"status": "ok"}),
            **handlers,
        }

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        handler = self._handlers.get(request.url.path.strip("/"))
        return handler(request) if handler is not None else error_response("not_found")

    def connection(self, **options: Any) -> ServerConnection:
        """A connection to this server."""
        return ServerConnection("http://server", transport=httpx.MockTransport(self), **options)


def body_of(request: httpx.Request) -> dict[str, Any]:
    """A JSON request's object."""
    value = json.loads(request.content)
    assert isinstance(value, dict)
    return value


class ScriptedVerifier:
    """Gives verdicts (or raises errors) from a list; repeats the last one."""

    def __init__(self, script: list[bool | Exception], name: str = "scripted", checks: bool = True) -> None:
        self._script = list(script)
        self.name = name
        self.checks = checks
        self.calls: list[tuple[str, str, str, str | None]] = []

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        self.calls.append((before.frame_id, after.frame_id, subtask, next_subtask))
        step = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(step, Exception):
            raise step
        return Verdict(success=step, confidence="High", reasoning="scripted")

    def close(self) -> None:
        pass


class ScriptedPolicy:
    """Subtasks and one chunk a cycle from a list; an exception in the list is raised in its turn."""

    name = "scripted"

    def __init__(
        self,
        subtasks: list[str] | Exception,
        chunks: list[list[list[float]] | Exception],
        info: PolicyInfo | None = None,
    ) -> None:
        self._subtasks = subtasks
        self._chunks = list(chunks)
        self._info = info or PolicyInfo(name="scripted", trained_to_act=True)
        self.asked_subtasks: list[str] = []
        self.asked_cycles: list[tuple[str, str]] = []
        self.alive_now = True
        self.closed = False

    def info(self) -> PolicyInfo:
        return self._info

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        self.asked_subtasks.append(frame.frame_id)
        if isinstance(self._subtasks, Exception):
            raise self._subtasks
        return SubtasksAnswer(list(self._subtasks), {"raw_text": str(self._subtasks)})

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        self.asked_cycles.append((frame.frame_id, subtask))
        chunk = self._chunks.pop(0) if len(self._chunks) > 1 else self._chunks[0]
        plan = (asked.motion_plan or "move down") if "motion_plan" in self._info.stages else None
        if plan is not None:
            yield PlanArrived(plan)
        if isinstance(chunk, Exception):
            raise chunk
        for index, row in enumerate(chunk):
            yield RowArrived(index, row, asked.episode_id)
        yield Answered(chunk, plan, asked.episode_id, {"raw_text": json.dumps(chunk)})

    def alive(self, timeout_s: float) -> bool:
        return self.alive_now

    def close(self) -> None:
        self.closed = True


class FakeClock:
    """Time that passes only when somebody sleeps, plus whatever a test adds."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now_s(self) -> float:
        return self.time_s

    def sleep_s(self, duration_s: float) -> None:
        self.time_s += max(duration_s, 0.0)


class FakeRobot:
    """An arm that is always where it was; counts its holds."""

    def __init__(self, clock: FakeClock, physical: bool = False) -> None:
        self._clock = clock
        self.holds: list[str] = []
        self._physical = physical
        joints = np.array([0.0, 0.02180, 0.18424, 0.0, 1.36474, 0.0])
        self._pose = forward(joints)
        self._joints = joints

    @property
    def capabilities(self) -> RobotCapabilities:
        return RobotCapabilities("fake", physical=self._physical, arrival_tolerance_m=0.003)

    def connect(self) -> None:
        pass

    def state(self) -> RobotState:
        tips = np.array([self._pose.position_m, self._pose.position_m])
        return RobotState(
            self._pose.position_m, self._pose.rotation, tips, self._joints, 1.0, self._clock.now_s()
        )

    def contacts(self) -> frozenset[str]:
        return frozenset()

    def command(self, position_m: Any, rotation: Any, duration_s: float) -> None:
        pass

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        pass

    def hold(self, reason: str) -> None:
        self.holds.append(reason)

    def close(self) -> None:
        self.hold("closed")


class FakeCamera:
    """A new picture for every call, or an error from a list."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._count = 0
        self.errors: list[Exception] = []

    def start(self) -> None:
        pass

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        if self.errors:
            raise self.errors.pop(0)
        self._count += 1
        return make_frame(self._count, self._clock.now_s())

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        self._clock.sleep_s(0.01)
        return self.latest(0.5, timeout_s)

    def close(self) -> None:
        pass


class WallCamera(FakeCamera):
    """A new picture for every call, stamped with the machine's clock."""

    def __init__(self) -> None:
        self._number = 0

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        self._number += 1
        return make_frame(self._number, SystemClock().now_s())

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        return self.latest(0.5, timeout_s)


class FakeExecutor:
    """Takes the rows; completes, or ends as the list says (an Outcome, or an exception to raise)."""

    def __init__(self, robot: FakeRobot, moves: Moves, script: list[Outcome | BaseException] | None = None) -> None:
        self._robot = robot
        self._moves = moves
        self._script = list(script or [])
        self.chunks: list[list[list[float]]] = []
        self.contexts: list[SafetyContext] = []
        self.taken = 0

    def run_chunk(
        self,
        rows: Iterable[Sequence[float]],
        context: SafetyContext,
        start: MotionStart | Callable[[], MotionStart] | None = None,
    ) -> ChunkResult:
        assert callable(start)
        start()
        self.contexts.append(context)
        step = self._script.pop(0) if self._script else Outcome.COMPLETED
        try:
            if isinstance(step, BaseException):
                raise step
            return self._run(rows, step)
        except BaseException as error:
            self.hold(str(error))
            raise

    def _run(self, rows: Iterable[Sequence[float]], outcome: Outcome) -> ChunkResult:
        if outcome is Outcome.NOT_STARTED:
            return ChunkResult(outcome, (), "scripted")
        done: list[list[float]] = []
        refused = outcome is Outcome.REFUSED
        verdict = "refuse" if refused else "pass"
        results = []
        for index, row in enumerate(rows):
            self.taken += 1
            done.append(list(row))
            allowed = None if refused else list(row)
            decision = Decision(allowed, "refuse" if refused else "pass", (), refused)
            data = {"row": list(row), "allowed": allowed, "verdict": verdict, "reasons": [], "ends_chunk": refused}
            self._moves("row", {"index": index, **data})
            if not refused:
                position = [0.3, 0.01 * self.taken, 0.15]
                self._moves("substep", {"step": 1, "of": 1, "ee_position_m": position, "verdict": "pass"})
            results.append(RowResult(index, list(row), decision, 0 if refused else 1, not refused))
            if refused:
                break
        self.chunks.append(done)
        return ChunkResult(outcome, tuple(results), "" if outcome is Outcome.COMPLETED else "scripted")

    def hold(self, reason: str) -> None:
        self._robot.hold(reason)
