"""An episode on a physical arm, assembled: what ``run --robot widowx`` and ``run --robot bridge`` are made of.

It has been run against doubles of the arms' drivers, never on an arm.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.clock import Clock, SystemClock
from vlm2vla_client.config import ClientConfig, make_limits, refuse_read_only
from vlm2vla_client.confirm import Confirm
from vlm2vla_client.episode import EpisodeResult, LoopConfig, Parts
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.executor import Executor, Monitors
from vlm2vla_client.live import LiveView
from vlm2vla_client.loop import run_episode
from vlm2vla_client.moves import Moves
from vlm2vla_client.operator_keys import NoOperator, Operator
from vlm2vla_client.policies.base import Policy, Scenario
from vlm2vla_client.progress import Progress
from vlm2vla_client.recorder import MIN_FREE_BYTES, Recorder, recorder_in
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.robots.bridge import BridgeRobot, BridgeSettings
from vlm2vla_client.robots.widowx import WidowXRobot, WidowXSettings
from vlm2vla_client.safety import Limits
from vlm2vla_client.shadow import Shadow
from vlm2vla_client.verifiers.base import Verifier
from vlm2vla_client.watch import Watch

#: A check takes about a millisecond, on a processor that others use too sometimes ten. The second look, half this time
#: before a substep, is as fresh as what a driver of 100 readings a second says.
CHECK_AHEAD_S: Final = 0.02


@dataclass(frozen=True)
class PhysicalRun:
    """One episode, as asked for; the names are those of the command line."""

    task: str
    scenario: Scenario = "out_of_distribution"
    seed: int | None = None
    execute: Literal["whole", "streamed"] = "whole"
    speed: float = 1.0
    max_cycles: int = 30
    dry_run: bool = False
    confirm: Confirm | None = None
    operator: Operator = field(default_factory=NoOperator)
    shadow: Shadow | None = None
    verify_deadline_s: float = 60.0
    min_free_bytes: int = MIN_FREE_BYTES
    live: LiveView | None = None


def make_robot(name: str, config: ClientConfig) -> tuple[Robot, str]:
    """The arm by its name, not yet connected, and what it is called in the record of its commissioning.

    Raises:
        ConfigurationError: an unknown name, one that is only read, or a table of client.toml that cannot be right.
    """
    if name == "widowx":
        widowx = WidowXSettings.from_table(config.arms.get("widowx", {}))
        return WidowXRobot(widowx), widowx.name
    if name == "bridge":
        bridge = BridgeSettings.from_table(config.arms.get("bridge", {}))
        return BridgeRobot(bridge), f"{bridge.host}:{bridge.port}"
    refuse_read_only(name)
    raise ConfigurationError(f"unknown physical robot {name!r}; known are widowx, bridge")


def physical_limits(overrides: Mapping[str, Any]) -> Limits:
    """The bench's limits. Raises ConfigurationError when nobody has measured where its counter and wall are."""
    missing = [key for key in ("counter_z_m", "wall_x_m") if key not in overrides]
    if missing:
        raise ConfigurationError(
            f"limits.toml lacks {' and '.join(missing)}: find them with `vlm2vla-client calibrate`, or measure them in "
            "the arm's base frame and give them to `configure`; a physical arm does not move without them"
        )
    return make_limits(overrides, counter_z_m=float(overrides["counter_z_m"]), wall_x_m=float(overrides["wall_x_m"]))


def run_on_arm(
    request: PhysicalRun,
    robot: Robot,
    camera: Camera,
    policy: Policy,
    verifier: Verifier,
    limits: Limits,
    folder: Path | Recorder,
    progress: Progress,
    clock: Clock | None = None,
) -> EpisodeResult:
    """Connects, runs and records one episode; blocks until it ends. The arm holds afterwards, whatever happened.

    Args:
        policy: closed at the end, as robot and camera are.
        folder: a new folder for the recording, or a recorder of one's own.

    Raises:
        ClientError: before anything moved (no driver, no camera, no server). Later faults end in the result.
    """
    clock = clock or SystemClock()
    name = robot.capabilities.name
    try:
        robot.connect()
        camera.start()
        progress.started(request.task, f"{name}, speed {request.speed:g}, policy {policy.info().name}")
        with recorder_in(folder, request.min_free_bytes, request.live) as recorder:
            recorder.limits(limits)
            moves = Moves(recorder, progress, robot, camera, limits)
            watch = Watch(policy, camera)
            monitor = Monitors(request.operator, watch)
            executor = Executor(
                robot, clock, limits, monitor, speed=request.speed, on_event=moves, ahead_s=CHECK_AHEAD_S
            )
            parts = Parts(
                policy=policy,
                robot=robot,
                camera=camera,
                verifier=verifier,
                executor=executor,
                moves=moves,
                watch=watch,
                clock=clock,
                recorder=recorder,
                progress=progress,
                confirm=request.confirm,
                operator=request.operator,
                shadow=request.shadow,
            )
            return run_episode(parts, _loop_config(request, limits, name))
    finally:
        robot.close()
        camera.close()
        policy.close()


def _loop_config(request: PhysicalRun, limits: Limits, robot: str) -> LoopConfig:
    return LoopConfig(
        task=request.task,
        episode_id=uuid.uuid4().hex,
        scenario=request.scenario,
        execute=request.execute,
        max_cycles=request.max_cycles,
        max_answer_age_s=limits.max_answer_age_s,
        verify_deadline_s=request.verify_deadline_s,
        seed=request.seed,
        dry_run=request.dry_run,
        recorded={
            "robot": robot,
            "speed": request.speed,
            "confirmed": request.confirm is not None,
            "shadow": request.shadow is not None,
        },
    )
