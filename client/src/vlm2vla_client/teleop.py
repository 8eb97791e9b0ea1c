"""``vlm2vla-client teleop``: the arm by a person's keys, through the same filter, recorded as an episode to learn from.

One key press is one row: a step of ``--step-m``, a turn, or the gripper. A held key repeats its step, and the repeats
that come while one runs are dropped, so the arm stands at most one step after the key was let go: a terminal has no
key-up, and need not have one here. SPACE, or any key but the one that moves, holds within a substep. Every row is a
``step`` with its picture, its state and its action, as ``vlm2vla-train ingest`` reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from vlm2vla_client import physical
from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.cameras.choose import CameraOptions, open_camera
from vlm2vla_client.clock import Clock, SystemClock
from vlm2vla_client.commands import SIM_EXTRA, camera_options, check_task
from vlm2vla_client.commissioning import UNCOMMISSIONED_SPEED, is_commissioned
from vlm2vla_client.config import ClientConfig, load_config
from vlm2vla_client.errors import ConfigurationError, SafetyStop
from vlm2vla_client.executor import ChunkResult
from vlm2vla_client.keys import Keys, require_terminal
from vlm2vla_client.live_rerun import VIEWER, open_live
from vlm2vla_client.moves import Moves
from vlm2vla_client.operator_arm import OperatorArm, OperatorHeld
from vlm2vla_client.operator_bench import add_bench_arguments, operated, robot_of, speed
from vlm2vla_client.operator_keys import RESUME_DEADLINE_S, Say, SpaceHolds, say_to_operator
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import Recorder, new_episode_folder, plain
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.safety import Limits

DEFAULT_SPEED: Final = 0.2
DEFAULT_STEP_M: Final = 0.01
MAX_STEP_M: Final = 0.05
TURN_RAD: Final = 0.1
DIRECTIONS: Final[dict[str, tuple[int, int, int]]] = {
    "f": (1, 0, 0),
    "b": (-1, 0, 0),
    "l": (0, 1, 0),
    "r": (0, -1, 0),
    "u": (0, 0, 1),
    "d": (0, 0, -1),
}
TURNS: Final = {",": TURN_RAD, ".": -TURN_RAD}
HELP: Final = """\
  f forward   b back   l left   r right   u up   d down   , . turn left, right   g opens or closes the gripper
  SPACE or another key stops a step   q ends"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; those shared with ``run`` mean the same."""
    parser.add_argument("--task", required=True, metavar="TEXT", help="what you are going to do, for the recording")
    add_bench_arguments(parser)
    parser.add_argument("--scene", metavar="NAME", help="twin: a suite's scene, or 'kitchen' (default: the task's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="twin: which scene (0: a seed of training)")
    parser.add_argument("--speed", type=speed, default=DEFAULT_SPEED, metavar="F", help=f"default {DEFAULT_SPEED}")
    parser.add_argument("--step-m", type=_step, default=DEFAULT_STEP_M, metavar="M", help=f"default {DEFAULT_STEP_M}")
    parser.add_argument("--rerun", nargs="?", const=VIEWER, metavar="WHERE", help="show it live in Rerun, as in run")


def _step(text: str) -> float:
    value = float(text)
    if not 0.001 <= value <= MAX_STEP_M:
        raise argparse.ArgumentTypeError(f"expected 0.001 to {MAX_STEP_M} metres, received {text}")
    return value


class OneKey(SpaceHolds):
    """Repeats of the key that moves are its own; every other key holds, SPACE among them."""

    moves = ""

    def _look(self, pressed: str) -> str | None:
        return "held by the operator (another key)" if pressed.strip(self.moves) else None


@dataclass(frozen=True)
class Station:
    """A connected arm and its camera; ``config`` is what the recording's first line says of them."""

    robot: Robot
    clock: Clock
    camera: Camera
    limits: Limits
    config: dict[str, Any]
    turns: bool = True


def teleop(arguments: argparse.Namespace) -> int:
    """Follows the keys until ``q``; 0 when the episode was recorded.

    Raises:
        ConfigurationError: no terminal, no calibration, or settings that cannot be right; nothing was connected.
        RobotError, SafetyStop, CameraError, KeyboardInterrupt: the arm holds; what was recorded stays.
    """
    config = load_config(arguments.config)
    name = robot_of(arguments, config)
    check_task(arguments.task)
    camera = camera_options(arguments, arguments.camera or ("twin" if name == "twin" else config.camera))
    keys = require_terminal("teleop")
    live = open_live(arguments.rerun)
    try:
        with _station(arguments, config, name, camera) as (station, share, step_m):
            folder = new_episode_folder(arguments.record, arguments.task)
            with Recorder(folder, min_free_bytes=config.min_free_disk_mb << 20, live=live) as recorder:
                return _episode(arguments.task, station, recorder, keys, share, step_m)
    finally:
        if live is not None:
            live.close()


@contextlib.contextmanager
def _station(
    arguments: argparse.Namespace, config: ClientConfig, name: str, camera: CameraOptions | None
) -> Iterator[tuple[Station, float, float]]:
    """The arm and the camera, with the speed and the step that this arm is allowed; both are let go afterwards."""
    if name == "twin":
        with _twin(arguments) as station:
            yield station, arguments.speed, arguments.step_m
        return
    if camera is None or camera.plays_recording:
        raise ConfigurationError(f"the robot {name!r} needs a camera that sees its bench now: see --camera")
    limits = physical.physical_limits(config.limits)
    robot, arm_name = physical.make_robot(name, config)
    share, step_m = arguments.speed, arguments.step_m
    if not is_commissioned(name, arm_name, limits):
        share, step_m = min(share, UNCOMMISSIONED_SPEED), min(step_m, DEFAULT_STEP_M)
        print(f"{name} {arm_name} was never commissioned: --speed {share:g} --step-m {step_m:g} apply", file=sys.stderr)
    clock = SystemClock()
    eye = open_camera(camera, clock)
    try:
        robot.connect()
        eye.start()
        about = {"robot": name, "arm": arm_name, "camera": camera.name}
        yield Station(robot, clock, eye, limits, about, turns=name != "bridge"), share, step_m
    finally:
        robot.close()
        eye.close()


@contextlib.contextmanager
def _twin(arguments: argparse.Namespace) -> Iterator[Station]:
    try:
        from vlm2vla_client.scenes import choose_scene
        from vlm2vla_client.sim import SimBench
    except ImportError as error:
        raise ConfigurationError(f"{SIM_EXTRA} ({error})") from None
    choice = choose_scene(arguments.task, arguments.scene, arguments.seed)
    bench = SimBench.open(choice, {}, arguments.realtime)
    about = {"robot": "twin", "camera": "twin", "scene": choice.name, "seed": choice.seed,
             "scene_spec": plain(choice.spec)}  # fmt: skip
    try:
        yield Station(bench.robot, bench.clock, bench.camera, bench.limits, about)
    finally:
        bench.close()


def _episode(task: str, station: Station, recorder: Recorder, keys: Keys, share: float, step_m: float) -> int:
    """From the first key to the verdict."""
    moves = Moves(recorder, SilentProgress(), station.robot, station.camera, station.limits)
    moves.begin(1, 0)
    stop = OneKey(keys)
    config = {**station.config, "policy": "teleop", "speed": share, "step_m": step_m}
    with keys, operated(station.robot, recorder, task, config):
        arm = OperatorArm(station.robot, station.clock, station.limits, recorder, share, stop, sink=moves)
        success = Driving(arm, keys, stop, say_to_operator, step_m, station.turns).follow()
        arm.hold("teleop ended")
        rows = moves.counts["executed"]
        recorder.summary({"task": task, "outcome": "executed", "exit_code": 0, "success": success, "rows": rows})
    print(f"{rows} rows, {'success' if success else 'no success'}; the arm holds; recorded in {recorder.folder}")
    return 0


class Driving:
    """One person's keys, turned into rows."""

    def __init__(self, arm: OperatorArm, keys: Keys, stop: OneKey, say: Say, step_m: float, turns: bool) -> None:
        self._arm, self._keys, self._stop, self._say = arm, keys, stop, say
        self._step_m, self._turns = step_m, turns

    def follow(self) -> bool:
        """Until ``q``; then whether the person calls it a success.

        Raises:
            SafetyStop: no key in ten minutes, or the terminal is gone.
            RobotError: the arm did not arrive, or its driver failed.
        """
        self._say(f"teleop: {self._arm.robot.capabilities.name}, {100 * self._step_m:g} cm a step")
        self._say(HELP)
        while (key := self._key()) != "q":
            if key in DIRECTIONS or key in TURNS or key == "g":
                self._obey(key)
            elif key != " ":  # SPACE after the step that it stopped
                self._say(HELP)
        self._say("  did it succeed? [y]es, anything else no")
        return self._key().lower() == "y"

    def _key(self) -> str:
        key = self._keys.wait(RESUME_DEADLINE_S)
        if key is None:
            raise SafetyStop(f"no key for {RESUME_DEADLINE_S:.0f} s; the arm holds")
        return key

    def _obey(self, key: str) -> None:
        """One row, and a line that says where it ended and what the filter took from it."""
        if key in TURNS and not self._turns:
            self._say("  this arm's backend does not turn")
            return
        self._stop.moves = key
        try:
            with self._stop.moving():
                if key in DIRECTIONS:
                    result = self._arm.shift([self._step_m * part for part in DIRECTIONS[key]])
                elif key in TURNS:
                    result = self._arm.turn(TURNS[key])
                else:
                    result = self._arm.grip(not self._arm.grip_open)
            told = self._line(key, result)
        except OperatorHeld:
            told = "  held"
        except SafetyStop as refusal:
            told = f"  {refusal}"
        finally:
            self._keys.pending()  # repeats of a held key: it stops when it is let go
        self._say(told)

    def _line(self, key: str, result: ChunkResult) -> str:
        reasons = sorted({reason for row in result.rows for reason in row.decision.reasons} | set(result.reasons))
        place = ", ".join(f"{v:+.3f}" for v in self._arm.position())
        grip = "open" if self._arm.grip_open else "closed"
        why = f"  ({', '.join(reasons)})" if reasons else ""
        return f"  {key}  at ({place}) m, {grip}{why}"
