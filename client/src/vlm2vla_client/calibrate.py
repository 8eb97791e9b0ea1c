"""``vlm2vla-client calibrate``: the operator lowers the gripper onto the counter at three points, step by step.

Every step is one small row through the filter at a twentieth of the speed, and one key press. The arm is never made
limp: without torque it falls. Nothing is known of the counter yet, so how low a step may go (``--lowest-m``) and what
stands in the way are the operator's responsibility.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client import physical
from vlm2vla_client.calibration import Counter, counter_of, useless
from vlm2vla_client.config import ClientConfig, default_path, load_config, make_limits
from vlm2vla_client.configure import MAX_COUNTER_M, WALL_M, save_measured
from vlm2vla_client.errors import NotCompletedError, SafetyStop
from vlm2vla_client.keys import Keys, require_terminal
from vlm2vla_client.operator_arm import OperatorArm, OperatorHeld, is_down, matrix_of, rotation_vector
from vlm2vla_client.operator_bench import Bench, add_bench_arguments, robot_of
from vlm2vla_client.operator_keys import Say, SpaceHolds, key_of_operator, say_to_operator
from vlm2vla_client.safety import Limits, Reason
from vlm2vla_twin.kinematics import DOWN

FloatArray = NDArray[np.float64]

SPEED: Final = 0.05
STEPS: Final[dict[str, tuple[float, float, float]]] = {
    "d": (0.0, 0.0, -0.002),
    "s": (0.0, 0.0, -0.0005),
    "u": (0.0, 0.0, 0.005),
    "f": (0.01, 0.0, 0.0),
    "b": (-0.01, 0.0, 0.0),
    "l": (0.0, 0.01, 0.0),
    "r": (0.0, -0.01, 0.0),
}
TURN_RAD: Final = 0.05
MAX_LEAN_RAD: Final = 0.1
#: So far the command may run ahead of the fingers: then they stand on something, or against it.
MAX_PRESS_M: Final = 0.003
RISE_M: Final = 0.03
SETTLE_S: Final = 0.1
DEFAULT_LOWEST_M: Final = -0.02
FAR_WALL_M: Final = 1.0
HELP: Final = """\
  d down 2 mm   s down 0.5 mm   u up 5 mm   f forward   b back   l left   r right, 1 cm   t turn towards straight down
  SPACE stops a step   Enter takes the touch   z takes the last point back   q ends, nothing is written"""


class OnlySpaceHolds(SpaceHolds):
    """For steps that a held key repeats: the repeats are dropped, SPACE holds."""

    def _look(self, pressed: str) -> str | None:
        return "held by the operator (SPACE)" if " " in pressed else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_bench_arguments(parser)
    parser.add_argument("--lowest-m", type=_height, default=DEFAULT_LOWEST_M, metavar="M",
                        help=f"no step goes below this, base frame (default {DEFAULT_LOWEST_M})")  # fmt: skip
    wall = parser.add_mutually_exclusive_group()
    wall.add_argument("--wall", action="store_true", help="touch the wall too, after the counter")
    wall.add_argument("--wall-x-m", type=_wall, metavar="M", help="where the wall begins, measured with a rule")


def _height(text: str) -> float:
    value = float(text)
    if not -MAX_COUNTER_M <= value <= MAX_COUNTER_M:
        raise argparse.ArgumentTypeError(f"expected {-MAX_COUNTER_M} to {MAX_COUNTER_M} metres, received {text}")
    return value


def _wall(text: str) -> float:
    value = float(text)
    if not WALL_M[0] <= value <= WALL_M[1]:
        raise argparse.ArgumentTypeError(f"expected {WALL_M[0]} to {WALL_M[1]} metres, received {text}")
    return value


def calibrate(arguments: argparse.Namespace) -> int:
    """Walks through it; 0 when limits.toml was written (with ``--sim``: when it would have been).

    Raises:
        ConfigurationError: no terminal, or settings that cannot be right; nothing was connected.
        NotCompletedError: the points describe no level counter, or the operator did not agree; nothing was written.
        RobotError, SafetyStop, KeyboardInterrupt: the arm holds; nothing was written.
    """
    config = load_config(arguments.config)
    name = robot_of(arguments, config)
    keys = require_terminal("calibrate")
    limits = limits_before(config, arguments.lowest_m)
    arm_name = "twin" if name == "twin" else physical.make_robot(name, config)[1]
    bench = Bench(name, arm_name, limits, config, arguments.realtime)
    stop = OnlySpaceHolds(keys)
    with keys, bench.open("calibrate", arguments.record, SPEED, stop) as arm:
        measured = Touching(arm, keys, stop, say_to_operator).measure(arguments.wall, arguments.wall_x_m)
        arm.recorder.summary({"task": "calibrate", "outcome": "executed", "exit_code": 0, **measured})
    if not bench.is_physical:
        print(f"rehearsed on the twin, nothing was written: {measured}")
        return 0
    file = save_measured(config.path or default_path(), measured)
    print(f"wrote {file}: {', '.join(f'{key} = {value}' for key, value in measured.items())}")
    missing = [key for key in ("counter_z_m", "wall_x_m") if key not in {**config.limits, **measured}]
    if missing:
        print(f"note: {missing[0]} is not measured: a physical arm does not move without it; give --wall or --wall-x-m")
    print("next: vlm2vla-client doctor --commission")
    return 0


def limits_before(config: ClientConfig, lowest_m: float) -> Limits:
    """The limits while nobody knows the counter: the bench's own, with the floor where the operator says."""
    known: dict[str, Any] = {key: value for key, value in config.limits.items()
                             if key not in ("counter_z_m", "wall_x_m")}  # fmt: skip
    plain = make_limits(known, counter_z_m=0.0, wall_x_m=FAR_WALL_M)
    low, high = plain.box_min_m, plain.box_max_m

    def raised(corner: tuple[float, float, float]) -> tuple[float, float, float]:
        return (corner[0], corner[1], corner[2] - lowest_m)  # heights count from the floor, which is at lowest_m

    boxes = tuple((raised(a), raised(b)) for a, b in plain.forbidden_boxes)
    changed = {"box_min_m": (low[0], low[1], 0.0), "box_max_m": raised(high), "forbidden_boxes": boxes}
    return make_limits({**known, **changed}, counter_z_m=lowest_m, wall_x_m=FAR_WALL_M)


class Touching:
    """One calibration in progress."""

    def __init__(self, arm: OperatorArm, keys: Keys, stop: SpaceHolds, say: Say) -> None:
        self._arm, self._keys, self._stop, self._say = arm, keys, stop, say
        # One more step must still count as arrived, or the executor ends what the operator's eye should.
        tolerance_m = arm.robot.capabilities.arrival_tolerance_m
        self._max_press_m = min(MAX_PRESS_M, tolerance_m - float(np.abs(STEPS["d"]).max()))

    def measure(self, touch_wall: bool, wall_x_m: float | None) -> dict[str, float]:
        """The measured limits, by their names, after the operator's yes. Raises as ``calibrate`` does."""
        self._say(f"calibrate: {self._arm.robot.capabilities.name}. The arm moves by your keys, a little at a time.")
        lowest_m = self._arm.limits.counter_z_m
        self._say(f"  Nothing but you stops it above {lowest_m:+.3f} m: clear the counter, a hand at the power switch,")
        self._say("  and support the arm before you cut its power. Touch with a strip of paper under the fingers:")
        self._say("  lower until it can just not be pulled out.")
        self._say(HELP)
        counter = self._counter()
        measured = {"counter_z_m": round(counter.counter_z_m, 4)}
        if touch_wall:
            wall_x_m = self._wall()
        if wall_x_m is not None:
            measured["wall_x_m"] = round(wall_x_m, 4)
        self._say(
            f"  counter {counter.counter_z_m:+.4f} m, tilt {math.degrees(counter.tilt_rad):.2f} degrees, points within "
            f"{1000 * counter.spread_m:.1f} mm" + ("" if wall_x_m is None else f"; wall {wall_x_m:.3f} m")
        )
        self._say("  right? [y]es writes it, anything else nothing")
        if (self._key() or "").lower() != "y":
            raise NotCompletedError("not confirmed; nothing was written")
        return measured

    def _counter(self) -> Counter:
        points: list[FloatArray] = []
        while len(points) < 3:
            self._say(f"  point {len(points) + 1} of 3: lower the gripper onto the counter, then Enter")
            point = self._touch(bool(points))
            if point is None:
                points.pop()
                continue
            points.append(point)
            self._step("rise", (0.0, 0.0, RISE_M))
            problem = useless(points)
            if problem is not None:
                points.pop()
                self._say(f"  not taken: {problem}; touch elsewhere")
                continue
            self._say(f"  point {len(points)} at {_place(point)} m")
        counter = counter_of(points)
        if counter.problem is not None:
            raise NotCompletedError(f"{counter.problem}; nothing was written")
        return counter

    def _touch(self, may_undo: bool) -> FloatArray | None:
        """Steers until Enter: [x, y, z] of the touch; None when the last point is taken back."""
        while True:
            key = self._key()
            if key in ("\r", "\n"):
                state = self._arm.state()
                if not is_down(state.ee_rotation, MAX_LEAN_RAD):
                    self._say("  not taken: the gripper does not point straight down; u raises it, t turns it")
                    continue
                return self._lowest()
            if key == "z" and may_undo:
                self._say("  the last point is taken back")
                return None
            self._obey(key)

    def _wall(self) -> float:
        """The wall's distance. The box ends where it does: a wall beyond it is measured with a rule."""
        ends_m = self._arm.limits.box_max_m[0]
        self._say(f"  wall: touch it with the fingers, then Enter (the box ends at {ends_m:.2f} m)")
        while (key := self._key()) not in ("\r", "\n"):
            self._obey(key)
        ahead_m = float(self._arm.tips()[:, 0].max())
        self._step("back", (-RISE_M, 0.0, 0.0))
        if not WALL_M[0] <= ahead_m <= WALL_M[1]:
            raise NotCompletedError(f"a wall at {ahead_m:.3f} m cannot be; nothing was written")
        return ahead_m

    # --- one key --------------------------------------------------------------------------------------------------

    def _key(self) -> str:
        return key_of_operator(self._keys)

    def _obey(self, key: str) -> None:
        if key == "t":
            self._turn()
        elif key in STEPS:
            self._step(key, STEPS[key])
        else:
            self._say(HELP)

    def _step(self, name: str, shift: tuple[float, float, float]) -> None:
        """One step; what the filter or the counter takes from it is said."""
        pressed_m = self._behind_m(shift)
        if pressed_m > self._max_press_m and shift[2] <= 0.0:  # upwards it is the arm's weight
            self._say(f"  the fingers stay {1000 * pressed_m:.1f} mm behind the command: they touch something")
            return
        if shift[2] == 0.0 and "counter" in self._arm.robot.contacts():
            self._say("  the motors feel the counter: raise the arm (u) before it goes sideways")
            return
        try:
            with self._stop.moving():
                result = self._arm.shift(shift)
            self._arm.clock.sleep_s(SETTLE_S)
        except OperatorHeld:
            self._say("  held")
            return
        except SafetyStop as refusal:
            self._say(f"  {refusal}")
            return
        finally:
            self._keys.pending()  # repeats of a held key: it stops when it is let go
        reasons = {reason for row in result.rows for reason in row.decision.reasons} | set(result.reasons)
        self._say(f"  {name:<5} finger tips at {_place(self._lowest())} m{self._why(reasons)}")

    def _why(self, reasons: set[Reason]) -> str:
        if Reason.COUNTER_REACHED in reasons or Reason.COUNTER_CONTACT in reasons:
            floor_m = self._arm.limits.counter_z_m
            if self._lowest()[2] - floor_m < 0.004:
                return f"  (the lowest height that --lowest-m {floor_m:g} allows)"
            return "  (the motors feel resistance: is it touching?)"
        return f"  ({', '.join(sorted(reasons))})" if reasons else ""

    def _turn(self) -> None:
        """A small rotation towards straight down; the position stays."""
        if self._arm.robot.capabilities.name == "bridge":
            self._say("  the bridge backend does not turn: turn the gripper down with its own client first")
            return
        state = self._arm.state()
        left = rotation_vector(DOWN @ np.asarray(state.ee_rotation).T)
        angle = float(np.linalg.norm(left))
        share = min(TURN_RAD / angle, 1.0) if angle > 1e-3 else 0.0
        goal = matrix_of(left * share) @ np.asarray(state.ee_rotation)
        try:
            with self._stop.moving():
                self._arm.go(self._arm.base(), goal)
        except OperatorHeld:
            self._say("  held")
        except SafetyStop as refusal:
            self._say(f"  {refusal}")
        finally:
            self._keys.pending()
        self._say(f"  {math.degrees(max(angle - TURN_RAD, 0.0)):.0f} degrees from straight down")

    def _behind_m(self, shift: tuple[float, float, float]) -> float:
        """How far the arm is behind its command along the way it shall go; something stopped it, whatever it weighs."""
        commanded = self._arm.commanded_m
        if commanded is None:
            return 0.0
        way = np.asarray(shift) / float(np.linalg.norm(shift))
        return float((commanded - self._arm.position()) @ way)

    def _lowest(self) -> FloatArray:
        """Between the finger tips, at the height of the lower one."""
        tips = self._arm.tips()
        return np.array([*tips[:, :2].mean(axis=0), tips[:, 2].min()])


def _place(point: FloatArray) -> str:
    return "(" + ", ".join(f"{v:+.4f}" for v in point) + ")"
