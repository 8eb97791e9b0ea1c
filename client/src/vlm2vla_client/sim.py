"""An episode in the twin, assembled: what ``run --sim`` and every trial of ``eval`` are made of."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.animation import Animation
from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.cameras.rehearsal import RehearsalCamera
from vlm2vla_client.cameras.twin import TwinCamera
from vlm2vla_client.clock import Clock, SystemClock
from vlm2vla_client.config import make_limits
from vlm2vla_client.confirm import Confirm
from vlm2vla_client.episode import EpisodeResult, LoopConfig, Parts
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.executor import Executor, Monitors
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.live import LiveView
from vlm2vla_client.loop import run_episode
from vlm2vla_client.moves import Moves
from vlm2vla_client.operator_keys import NoOperator, Operator
from vlm2vla_client.policies.base import Policy
from vlm2vla_client.policies.baselines import BASELINES, open_baseline
from vlm2vla_client.policies.expert import ExpertPolicy
from vlm2vla_client.policies.random import RandomPolicy
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_client.policies.swapped import SwappedPolicy
from vlm2vla_client.progress import Progress
from vlm2vla_client.recorder import MIN_FREE_BYTES, Recorder, plain, recorder_in
from vlm2vla_client.robots.twin import TwinClock, TwinRobot
from vlm2vla_client.safety import Limits
from vlm2vla_client.scenes import SceneChoice, choose_scene
from vlm2vla_client.shadow import open_shadow
from vlm2vla_client.verifiers.base import Verifier
from vlm2vla_client.verifiers.chain import MEMBER_DEADLINE_S
from vlm2vla_client.verifiers.choose import make_chain
from vlm2vla_client.verifiers.twin import TruthCamera, TwinVerifier
from vlm2vla_client.watch import LIVENESS_LIMIT_S, Watch
from vlm2vla_twin.camera import Camera as Renderer
from vlm2vla_twin.expert import Expert
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import COUNTER_Z_M, WALL_X_M
from vlm2vla_twin.tasks import Judge

SWAPPED_SEED_SHIFT = 7919
REST_BEFORE_JUDGING_S = 1.5
READY_WAIT_S = 120.0


@dataclass(frozen=True)
class SimRequest:
    """One episode in the twin, as asked for.

    Attributes:
        choice: scene, scenario and judge (``scenes.choose_scene``).
        policy: server, expert, random, swapped (the server's policy, shown another seed's picture) or a baseline.
        verifiers: names in the order of the chain.
        connection: to the server; needed by policy ``server`` and ``swapped`` and by verifier ``server``.
        model: adapter name for the policy, None for the server's default.
        policy_server: where a baseline's own server answers.
        unnorm_key: whose statistics OpenVLA and ECoT scale by; None for BridgeData V2's.
        limits: overrides of the safety limits.
        realtime: let simulated seconds take as long as they say.
        animate: write ``episode.gif``.
        confirm: asked before every chunk.
        operator: whose keys hold the arm.
        shadow: a second, bare twin moves every chunk first.
        outside: verifiers that the caller made and closes (``verifiers.outside``), by name.
        camera: a real one or a recording, dated by the system's clock, in place of the twin's; its name beside it.
        min_free_bytes: what the recording leaves free on its disk.
        live: shows what is recorded; the caller closes it.
    """

    task: str
    choice: SceneChoice
    policy: str = "server"
    verifiers: Sequence[str] = ("server",)
    connection: ServerConnection | None = None
    model: str | None = None
    policy_server: str | None = None
    unnorm_key: str | None = None
    execute: Literal["whole", "streamed"] = "whole"
    speed: float = 1.0
    max_cycles: int = 30
    max_cycles_per_subtask: int = 5
    dry_run: bool = False
    realtime: bool = False
    animate: bool = True
    limits: Mapping[str, Any] = field(default_factory=dict)
    confirm: Confirm | None = None
    operator: Operator = field(default_factory=NoOperator)
    shadow: bool = False
    outside: Mapping[str, Verifier] = field(default_factory=dict)
    camera: Camera | None = None
    camera_name: str = "twin"
    min_free_bytes: int = MIN_FREE_BYTES
    live: LiveView | None = None


@dataclass
class SimBench:
    """The twin's world and everything attached to it."""

    world: World
    clock: TwinClock
    robot: TwinRobot
    camera: TruthCamera
    limits: Limits

    @classmethod
    def open(
        cls,
        choice: SceneChoice,
        limits: Mapping[str, Any],
        realtime: bool,
        real: Camera | None = None,
        *,
        simulated: bool = False,
    ) -> SimBench:
        """Builds the scene, connects the arm and starts the camera, the twin's own or a ``real`` one.

        Args:
            simulated: only simulated time passes (:class:`TwinClock`), as repeatable trials need it.

        Raises:
            CameraError: no OpenGL, or no picture from the real camera.
        """
        world = World(choice.spec)
        clock = TwinClock(world, realtime=realtime, simulated=simulated)
        robot = TwinRobot(world, clock)
        eye = TwinCamera(world, clock) if real is None else RehearsalCamera(real, SystemClock(), clock)
        camera = TruthCamera(eye, world)
        bench = cls(world, clock, robot, camera, sim_limits(limits))
        robot.connect()
        camera.start()
        return bench

    def close(self) -> None:
        """Holds the arm and stops the camera."""
        self.robot.close()
        self.camera.close()


def sim_limits(overrides: Mapping[str, Any]) -> Limits:
    """The twin's safety limits."""
    return make_limits(overrides, counter_z_m=COUNTER_Z_M, wall_x_m=WALL_X_M)


def swapped_image(choice: SceneChoice, mode: str = "varied") -> Callable[[], NDArray[np.uint8]]:
    """The first picture of the same suite's scene of another seed, always the same one."""
    seed = choice.seed + SWAPPED_SEED_SHIFT
    other = choose_scene("", choice.name, seed, choice.scenario, mode)
    picture: list[NDArray[np.uint8]] = []

    def give() -> NDArray[np.uint8]:
        if not picture:
            picture.append(Renderer(World(other.spec)).rgb())
        return picture[0]

    return give


def _connection(request: SimRequest) -> ServerConnection:
    if request.connection is None:
        raise ConfigurationError("this policy or verifier needs a server: give --server URL")
    return request.connection


def make_policy(request: SimRequest, world: World) -> Policy:
    """The policy by its name.

    Raises:
        ConfigurationError: an unknown name, or no server where one is needed.
    """
    if request.policy == "server":
        return ServerPolicy(_connection(request), model=request.model)
    if request.policy == "swapped":
        inner = ServerPolicy(_connection(request), model=request.model)
        return SwappedPolicy(inner, swapped_image(request.choice))
    if request.policy == "expert":
        return ExpertPolicy(Expert(world))
    if request.policy == "random":
        return RandomPolicy(request.choice.seed)
    if request.policy in BASELINES:
        return open_baseline(request.policy, request.policy_server, request.unnorm_key)
    raise ConfigurationError(f"unknown policy {request.policy!r}")


def make_verifier(request: SimRequest, bench: SimBench) -> Verifier:
    """The chain of verifiers by their names.

    Raises:
        ConfigurationError: a verifier that is unknown, was not made by the caller, or lacks its server.
    """
    suite = request.choice.suite
    whole = (request.task, suite.goal(bench.world.spec)) if suite is not None else None
    ready = {**request.outside, "twin": TwinVerifier(bench.world, bench.camera, whole)}
    return make_chain(request.verifiers, request.connection, request.model, ready)


def make_judge(choice: SceneChoice, bench: SimBench, planning: bool) -> Callable[[str], dict[str, Any]] | None:
    """Watches the physics from now on; called at the end with the policy's words, it gives the score."""
    suite = choice.suite
    if suite is None:
        return None
    judge = Judge(bench.world, suite)
    bench.clock.on_advance.append(judge.observe)

    def score(words: str) -> dict[str, Any]:
        bench.clock.sleep_s(REST_BEFORE_JUDGING_S)  # success asks for a second of rest
        return {"suite": suite.name, **plain(judge.score(words or None, planning))}

    return score


def _recorded(request: SimRequest) -> dict[str, Any]:
    choice = request.choice
    return {
        "robot": "twin",
        "camera": request.camera_name,
        "policy": request.policy,
        "scene": choice.name,
        "suite": choice.suite.name if choice.suite is not None else None,
        "seed": choice.seed,
        "speed": request.speed,
        "realtime": request.realtime,
        "shadow": request.shadow,
        "objects": [{"name": item.name, "position_m": item.position_m} for item in choice.spec.objects],
        "scene_spec": plain(choice.spec),
    }


def run_in_twin(request: SimRequest, folder: Path, progress: Progress) -> EpisodeResult:
    """Runs and records one episode in the twin; blocks until it ends.

    Args:
        folder: a new folder for the recording; ``episode.gif`` joins it when the request says so.

    Raises:
        ClientError: before anything moved (no server, no OpenGL, wrong usage). Later faults end in the result.
    """
    bench = SimBench.open(request.choice, request.limits, request.realtime, request.camera)
    try:
        policy, verifier = make_policy(request, bench.world), make_verifier(request, bench)
        asks_server = "server" in request.verifiers or request.policy in ("server", "swapped")
        if request.connection is not None and asks_server:
            progress.waiting("waiting for the server")
            request.connection.wait_ready(READY_WAIT_S)
        with of_this_episode(request, policy):
            return run_parts(request, bench, policy, verifier, folder, progress)
    finally:
        bench.close()


@contextlib.contextmanager
def of_this_episode(request: SimRequest, policy: Policy) -> Iterator[None]:
    """Closes a baseline's policy afterwards: it has a connection of its own, not the one that the caller closes."""
    try:
        yield
    finally:
        if request.policy in BASELINES:
            policy.close()


def run_parts(
    request: SimRequest,
    bench: SimBench,
    policy: Policy,
    verifier: Verifier,
    folder: Path | Recorder,
    progress: Progress,
) -> EpisodeResult:
    """``run_in_twin`` with a policy, a verifier and, in place of the folder, a recorder of one's own."""
    info = policy.info()
    planning = "motion_plan" in info.stages
    animation = Animation() if request.animate else None
    progress.started(request.task, f"twin, scene {request.choice.name}, seed {request.choice.seed}, policy {info.name}")
    clock: Clock = bench.clock
    with recorder_in(folder, request.min_free_bytes, request.live) as recorder:
        recorder.limits(bench.limits)
        display = animation.add if animation is not None else None
        moves = Moves(recorder, progress, bench.robot, bench.camera, bench.limits, display)
        # In simulated time a move takes hardly any: a silence then is this computer's, starved, not the server's.
        watch = Watch(policy, silence_limit_s=math.inf if bench.clock.simulated else LIVENESS_LIMIT_S)
        monitor = Monitors(request.operator, watch)
        executor = Executor(bench.robot, clock, bench.limits, monitor, speed=request.speed, on_event=moves)
        parts = Parts(
            policy=policy,
            robot=bench.robot,
            camera=bench.camera,
            verifier=verifier,
            executor=executor,
            moves=moves,
            watch=watch,
            clock=clock,
            recorder=recorder,
            progress=progress,
            confirm=request.confirm,
            operator=request.operator,
            shadow=open_shadow(bench.limits, request.speed) if request.shadow else None,
            judge=make_judge(request.choice, bench, planning),
        )
        result = run_episode(parts, _loop_config(request, bench.limits))
    if animation is not None:
        try:
            animation.save(recorder.folder / "episode.gif")
        except OSError as error:  # the episode is over and recorded; only its picture is missing
            progress.note(f"no episode.gif: {error.strerror}")
    return result


def _loop_config(request: SimRequest, limits: Limits) -> LoopConfig:
    return LoopConfig(
        task=request.task,
        episode_id=uuid.uuid4().hex,
        scenario=request.choice.scenario,
        execute=request.execute,
        max_cycles=request.max_cycles,
        max_cycles_per_subtask=request.max_cycles_per_subtask,
        max_answer_age_s=limits.max_answer_age_s,
        verify_deadline_s=MEMBER_DEADLINE_S * len(request.verifiers),
        seed=request.choice.seed,
        dry_run=request.dry_run,
        recorded=_recorded(request),
    )
