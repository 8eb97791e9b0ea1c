"""The WidowX 250S under ROS's own Python: a child process of ``robots/widowx.py``, never imported by the client.

ROS brings its own Python (Noetic 3.8, Humble 3.10), so this is one file in the syntax of 3.8 that needs the standard
library, numpy and Interbotix's modules only. It has never been run on a physical arm.

One JSON object a line, at most 4096 bytes, so that writing one to a pipe is all or nothing:

    in    {"op": "beat"}                                           at least every 0.3 s, or the arm holds by itself
          {"op": "command", "id", "position_m", "rotation", "duration_s"}          the newest one replaces older ones
          {"op": "gripper", "id", "open", "deadline_s"}    {"op": "hold", "id", "reason"}    {"op": "quit"}
    out   {"event": "ready", ...}   {"event": "state", ...} every 0.02 s   {"event": "ack", "id", "ok", "error"}
          {"event": "fatal", "error"}                                              nothing moves; the process ends

Whatever ends the connection (stdin closed, silence, a signal), the arm holds: goal := measured joints, torque stays on.
Torque is never switched, on or off; a hardware error is reported and refuses every further command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np

PROTOCOL = 1
HEARTBEAT_S = 0.3
TICK_S = 0.02
MAX_LINE_BYTES = 4096
WATCH_S = 1.0
SHUTDOWN_S = 2.0
MIN_MOVE_S = 0.02
MAX_JOINT_SPEED_RAD_S = math.pi
#: Above this a motor is near its own shutdown (Dynamixel X: 80 degrees Celsius).
MAX_TEMPERATURE_C = 70
#: Interbotix's IK accepts 1 mm and 1 mrad; solutions are refined to this, so that short moves are moves at all.
REFINED_M = 1e-5
REFINED_RAD = 1e-4
#: A refinement that leaves the neighbourhood of the vendor's solution is another solution.
MAX_REFINEMENT_RAD = 0.02
#: Sustained current (mA, waist to wrist_rotate) that is no longer work but a collision or a jam.
EFFORT_LIMIT_MA = (1200.0, 1500.0, 900.0, 900.0, 900.0, 1050.0)
EFFORT_S = 0.5
#: PWM of the gripper's motor while the fingers move, and what keeps a grip afterwards (vendor's range 150..350).
GRIP_EFFORT = 250.0
GRIP_HOLD_EFFORT = 150.0
FINGER_STILL_S = 0.2
FINGER_STILL_M = 0.0003
FINGER_AT_LIMIT_M = 0.001
FINGER_WRONG_WAY_M = 0.004
#: Fingers that stopped this far from closed have something between them.
OBJECT_M = 0.002


class Refused(Exception):
    """A command that is not carried out; its text goes to the client."""


class Wire:
    """JSON lines on a file descriptor that nothing else writes to; never blocks, drops what a stalled reader leaves."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        os.set_blocking(descriptor, False)

    def send(self, **message: Any) -> None:
        """Writes one line; a reader that is gone or asleep loses it."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            line = json.dumps({**message, "error": str(message.get("error"))[:500]}).encode() + b"\n"
        try:
            with self._lock:
                os.write(self._descriptor, line)
        except OSError:
            return  # the heartbeat ends what has no reader


# --- kinematics from the vendor's own description of the arm ------------------------------------------------------


def _screw(axis: Any, angle: float) -> Any:
    """exp([S] angle) [4, 4] of a revolute screw axis [6] (rotation, then moment)."""
    w, v = axis[:3], axis[3:]
    hat = np.array([[0.0, -w[2], w[1]], [w[2], 0.0, -w[0]], [-w[1], w[0], 0.0]])
    square = hat @ hat
    result = np.eye(4)
    result[:3, :3] += math.sin(angle) * hat + (1.0 - math.cos(angle)) * square
    result[:3, 3] = (angle * np.eye(3) + (1.0 - math.cos(angle)) * hat + (angle - math.sin(angle)) * square) @ v
    return result


def forward(screws: Any, home: Any, joints: Any) -> tuple[Any, Any]:
    """Pose [4, 4] of the end effector and its geometric Jacobian [6, 6] (rotation rows first), base frame."""
    pose, columns = np.eye(4), []
    for index in range(len(joints)):
        axis = screws[:, index]
        w = pose[:3, :3] @ axis[:3]
        columns.append((w, pose[:3, :3] @ axis[3:] + np.cross(pose[:3, 3], w)))
        pose = pose @ _screw(axis, joints[index])
    pose = pose @ home
    tip = pose[:3, 3]
    return pose, np.array([np.concatenate([w, v + np.cross(w, tip)]) for w, v in columns]).T


def error_between(pose: Any, goal: Any) -> Any:
    """[6]: the small rotation vector, then the translation, that lead from one pose to another."""
    turn = goal[:3, :3] @ pose[:3, :3].T
    vector = 0.5 * np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    return np.concatenate([vector, goal[:3, 3] - pose[:3, 3]])


def refine(screws: Any, home: Any, goal: Any, joints: Any) -> Any:
    """Newton steps from the vendor's solution to one within ``REFINED_M``; Refused when it is not one."""
    found = np.array(joints, dtype=float)
    for _ in range(6):
        pose, jacobian = forward(screws, home, found)
        error = error_between(pose, goal)
        if np.linalg.norm(error[3:]) <= REFINED_M and np.linalg.norm(error[:3]) <= REFINED_RAD:
            if np.abs(found - joints).max() > MAX_REFINEMENT_RAD:
                break
            return found
        found = found + np.linalg.lstsq(jacobian, error, rcond=1e-4)[0]
    raise Refused("Interbotix's inverse kinematics said yes to joints that do not reach the pose; nothing moved")


# --- the vendor ---------------------------------------------------------------------------------------------------


def find_flavour(asked: str) -> str:
    """ "ros1" or "ros2": as asked, or which of Interbotix's two packages this Python has."""
    if asked != "auto":
        return asked
    if importlib.util.find_spec("interbotix_xs_modules") is None:
        raise Refused(
            "this Python has no interbotix_xs_modules: source the ROS workspace that holds it ([widowx] setup = "
            '["/opt/ros/.../setup.bash", ".../install/setup.bash"] in client.toml)'
        )
    return "ros2" if importlib.util.find_spec("interbotix_xs_modules.xs_robot") is not None else "ros1"


def open_bot(flavour: str, model: str, name: str) -> Any:
    """Interbotix's manipulator. Without its driver ROS 1 exits and ROS 2 waits for ever: ``Deadline`` watches this."""
    if flavour == "ros1":
        from interbotix_xs_modules.arm import InterbotixManipulatorXS

        return InterbotixManipulatorXS(robot_model=model, group_name="arm", gripper_name="gripper", robot_name=name)
    from interbotix_xs_modules.xs_robot.arm import InterbotixManipulatorXS as Manipulator

    bot = Manipulator(robot_model=model, group_name="arm", gripper_name="gripper", robot_name=name)
    try:
        from interbotix_common_modules.common_robot.robot import robot_startup
    except ImportError:
        return bot  # before 2024 the ROS 2 flavour spins by itself
    robot_startup()
    return bot


def close_bot(flavour: str) -> None:
    """ROS 2's shutdown; ROS 1 has none. May block: called from a thread that is not waited for without end."""
    if flavour == "ros2":
        try:
            from interbotix_common_modules.common_robot.robot import robot_shutdown
        except ImportError:
            return
        robot_shutdown()


class Deadline:
    """Ends the process, with a line that says why, unless it is lifted in time."""

    def __init__(self, wire: Wire, seconds: float, text: str) -> None:
        self._wire, self._text = wire, text
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def lift(self) -> None:
        """It came in time."""
        self._timer.cancel()

    def _end(self) -> None:
        self._wire.send(event="fatal", error=self._text)
        os._exit(3)


# --- the arm ------------------------------------------------------------------------------------------------------


class Gripper:
    """Drives the fingers with bounded effort until they arrive or stop; called every tick."""

    def __init__(self, core: Any, lower_m: float, upper_m: float) -> None:
        self._core, self._lower_m, self._upper_m = core, lower_m, upper_m
        self._lock = threading.Lock()
        self._moving: bool | None = None  # True opening, False closing
        self._began_s = self._still_since_s = self._deadline_s = 0.0
        self._from_m = self._last_m = lower_m
        self.object = False
        self.problem: str | None = None

    def start(self, open_: bool, deadline_s: float, finger_m: float) -> None:
        """Positive effort opens in both flavours; the names grasp and release have been swapped between versions."""
        now_s = time.monotonic()
        with self._lock:
            self._moving, self._began_s, self._still_since_s, self._deadline_s = open_, now_s, now_s, deadline_s
            self._from_m = self._last_m = finger_m
            self.object = False
            self._write(GRIP_EFFORT if open_ else -GRIP_EFFORT)

    def settle(self) -> None:
        """Stop driving: a grip is kept at bounded effort, an opening stops."""
        with self._lock:
            if self._moving is not None:
                self._stop(self._last_m)

    def tick(self, finger_m: float) -> None:
        """Look where the fingers are."""
        with self._lock:
            if self._moving is None:
                return
            now_s = time.monotonic()
            if abs(finger_m - self._last_m) > FINGER_STILL_M:
                self._last_m, self._still_since_s = finger_m, now_s
            wrong_m = (self._from_m - finger_m) if self._moving else (finger_m - self._from_m)
            if wrong_m > FINGER_WRONG_WAY_M:
                self._moving = None
                self._write(0.0)
                self.problem = "the fingers moved against the command: is the gripper's motor reversed in its config?"
                return
            limit_m = self._upper_m if self._moving else self._lower_m
            there = abs(finger_m - limit_m) < FINGER_AT_LIMIT_M
            still = now_s - self._still_since_s >= FINGER_STILL_S
            if there or still or now_s - self._began_s >= self._deadline_s:
                self._stop(finger_m)

    def _stop(self, finger_m: float) -> None:
        closing = self._moving is False
        self.object = closing and finger_m - self._lower_m > OBJECT_M
        self._moving = None
        self._write(-GRIP_HOLD_EFFORT if closing else 0.0)

    def _write(self, effort: float) -> None:
        self._core.robot_write_joint_command("gripper", effort)


class Arm:
    """One arm: what is measured, moves, and hold. ``hold`` may come from any thread while another one plans."""

    def __init__(self, bot: Any) -> None:
        self._core = bot.core if hasattr(bot, "core") else bot.dxl
        self._arm = bot.arm
        info = self._arm.group_info
        if info.profile_type != "time" or info.mode != "position":
            raise Refused(
                "the arm group must have profile_type 'time' and mode 'position' in Interbotix's modes file, found "
                f"{info.profile_type!r} and {info.mode!r}; the vendor's API only logs this and moves wrongly"
            )
        self._index = [self._core.js_index_map[name] for name in info.joint_names]
        self._finger_index = self._core.js_index_map["left_finger"]
        self._lower = np.array(info.joint_lower_limits, dtype=float)
        self._upper = np.array(info.joint_upper_limits, dtype=float)
        self._screws = np.array(self._arm.robot_des.Slist, dtype=float)
        self._home = np.array(self._arm.robot_des.M, dtype=float)
        self.finger_lower_m, self.finger_upper_m = self._finger_limits(bot)
        self.gripper = Gripper(self._core, self.finger_lower_m, self.finger_upper_m)
        self._lock = threading.Lock()  # the goal: who writes it, and whether a hold came in between
        self._service = threading.Lock()  # the vendor's service calls, which are not safe from two threads
        self._generation = 0
        self._holding: tuple[str, bool] | None = ("connected", False)
        self._stamp: Any = None
        self._measured_s = 0.0
        self._effort_since_s: float | None = None
        self._motors = 0
        self.temperature_c: int | None = None
        self.fault: str | None = None

    @staticmethod
    def _finger_limits(bot: Any) -> tuple[float, float]:
        gripper = bot.gripper
        return float(gripper.left_finger_lower_limit), float(gripper.left_finger_upper_limit)

    @property
    def generation(self) -> int:
        """Changes with every hold: a move that was asked for before one must not start after it."""
        return self._generation

    def joints(self) -> Any:
        """[6] radians, from the newest message of the driver."""
        position = self._core.robot_get_joint_states().position
        return np.array([position[i] for i in self._index], dtype=float)

    def finger_m(self) -> float:
        """The left finger's distance from the middle."""
        return float(self._core.robot_get_joint_states().position[self._finger_index])

    def hold(self, reason: str, by_itself: bool) -> None:
        """Goal := measured joints; torque untouched; grip kept.

        A hold during a hold keeps the first one's goal: measuring anew would follow the sag of the arm downwards.
        """
        with self._lock:
            self._generation += 1
            if self._holding is None:
                self._core.robot_write_commands("arm", [float(v) for v in self.joints()])
            self._holding = (reason, by_itself)
        self.gripper.settle()

    def refuse_if_stopped(self) -> None:
        """Raises Refused after a fault, and after a hold of our own until the client has held too."""
        if self.fault is not None:
            raise Refused(self.fault)
        if self._holding is not None and self._holding[1]:
            raise Refused(f"the arm holds by itself ({self._holding[0]}): send hold first")

    def move(self, goal: Any, duration_s: float, generation: int) -> None:
        """Plan and start one move to a pose [4, 4]. Refused when it cannot be made; then nothing moved."""
        self.refuse_if_stopped()
        seconds = math.ceil(max(duration_s, MIN_MOVE_S) * 100.0 - 1e-6) / 100.0
        with self._service:
            # The vendor's checks use its last command and the time of the move before (toolboxes issue 89).
            self._arm.capture_joint_positions()
            self._arm.set_trajectory_time(seconds, seconds / 4.0)
            here = self.joints()
            answer = self._arm.set_ee_pose_matrix(goal, custom_guess=list(here), execute=False, blocking=False)
        # A failed search raises nothing: it is the second of two values, or a bare False.
        if not isinstance(answer, tuple) or len(answer) != 2 or not answer[1]:
            where = [round(float(v), 3) for v in goal[:3, 3]]
            raise Refused(f"no joint angles reach {where} m from here (Interbotix's inverse kinematics failed)")
        joints = refine(self._screws, self._home, goal, np.array(answer[0], dtype=float))
        if (joints < self._lower).any() or (joints > self._upper).any():
            raise Refused("the solution lies outside the joint limits; nothing moved")
        speed = float(np.abs(joints - here).max()) / seconds
        if speed > MAX_JOINT_SPEED_RAD_S:
            raise Refused(f"a joint would turn at {speed:.1f} rad/s (limit {MAX_JOINT_SPEED_RAD_S:.2f}); nothing moved")
        with self._lock:
            if generation != self._generation:
                raise Refused("held before the move began")
            self._core.robot_write_commands("arm", [float(v) for v in joints])
            self._holding = None

    def look(self) -> dict[str, Any]:
        """One measurement for the client; also notices overload. Called every tick, by one thread."""
        message = self._core.robot_get_joint_states()
        now_s = time.monotonic()
        if message.header.stamp != self._stamp:  # the core keeps a dead driver's last message for ever
            self._stamp, self._measured_s = message.header.stamp, now_s
        joints = [float(message.position[i]) for i in self._index]
        effort = [float(message.effort[i]) for i in self._index]
        finger_m = float(message.position[self._finger_index])
        self.gripper.tick(finger_m)
        self._judge_effort(effort, now_s)
        pose, _ = forward(self._screws, self._home, joints)
        holding = self._holding
        return {
            "t_s": self._measured_s,
            "joints_rad": joints,
            "effort_ma": effort,
            "finger_m": finger_m,
            "position_m": pose[:3, 3].tolist(),
            "rotation": pose[:3, :3].ravel().tolist(),
            "holding": None if holding is None else {"reason": holding[0], "by_itself": holding[1]},
            "fault": self.fault,
            "object": self.gripper.object,
            "temperature_c": self.temperature_c,
        }

    def _judge_effort(self, effort: list[float], now_s: float) -> None:
        over = [i for i, value in enumerate(effort) if abs(value) > EFFORT_LIMIT_MA[i]]
        if not over:
            self._effort_since_s = None
        elif self._effort_since_s is None:
            self._effort_since_s = now_s
        elif now_s - self._effort_since_s >= EFFORT_S:
            name = self._arm.group_info.joint_names[over[0]]
            self.fail(f"{name} drew {effort[over[0]]:.0f} mA for {EFFORT_S} s: free the arm, then start again")
        if self.gripper.problem is not None:
            self.fail(self.gripper.problem)

    def fail(self, text: str) -> None:
        """A fault that a person must look at: hold, and refuse everything from now on."""
        if self.fault is None:
            self.fault = text
            self.hold(text, True)

    def watch(self) -> None:
        """Reads temperatures and hardware errors of all motors; nothing here switches torque or reboots a motor."""
        with self._service:
            errors = self._registers("Hardware_Error_Status")
            temperatures = self._registers("Present_Temperature")
        self._motors = max(self._motors, len(errors))
        if len(errors) < self._motors:
            self.fail(f"{self._motors - len(errors)} motor(s) stopped answering: check the cables, support the arm")
        wrong = [f"motor {i + 1}: 0x{value:02x}" for i, value in enumerate(errors) if value]
        if wrong:
            self.fail(
                f"hardware error ({', '.join(wrong)}): that motor has no torque. Support the arm, find the cause, then "
                "reboot the motor by hand; torque is never switched on from here"
            )
        self.temperature_c = max(temperatures, default=0)
        if self.temperature_c > MAX_TEMPERATURE_C:
            self.fail(f"a motor is at {self.temperature_c} C (limit {MAX_TEMPERATURE_C}): let it cool")

    def _registers(self, register: str) -> list[int]:
        answer = self._core.robot_get_motor_registers("group", "all", register)
        return [int(v) for v in getattr(answer, "values", answer)]  # ROS 1 answers a message, ROS 2 a list


# --- the process --------------------------------------------------------------------------------------------------


class Server:
    """Reads requests, plans moves in a thread of its own, and keeps the beat."""

    def __init__(self, wire: Wire, arm: Arm) -> None:
        self._wire, self._arm = wire, arm
        self._heard_s = time.monotonic()
        self._wanted = threading.Condition()
        self._request: tuple[dict[str, Any], int] | None = None
        self.closed = threading.Event()

    def run(self) -> None:
        """Until the client is gone; then the arm holds."""
        for target in (self._read, self._plan, self._watch):
            threading.Thread(target=target, daemon=True).start()
        try:
            while not self.closed.is_set():
                if time.monotonic() - self._heard_s > HEARTBEAT_S and not self._held_alone():
                    self._arm.hold(f"no heartbeat for {HEARTBEAT_S} s", True)
                self._wire.send(event="state", **self._arm.look())
                self.closed.wait(TICK_S)
        finally:
            self._arm.hold("the client is gone", True)

    def _held_alone(self) -> bool:
        try:
            self._arm.refuse_if_stopped()
        except Refused:
            return True
        return False

    def _read(self) -> None:
        buffer = b""
        try:
            while True:
                piece = os.read(0, 65536)
                *lines, buffer = (buffer + piece).split(b"\n")
                if not piece or max(len(line) for line in [*lines, buffer]) > MAX_LINE_BYTES:
                    return  # nobody we know writes longer lines
                for line in lines:
                    self._one(line)
        finally:
            self.closed.set()

    def _one(self, line: bytes) -> None:
        try:
            request = json.loads(line)
            operation, number = request["op"], request.get("id")
        except (ValueError, TypeError, KeyError, AttributeError):
            return self._wire.send(event="ack", id=None, ok=False, error=f"not a request: {line[:80]!r}")
        self._heard_s = time.monotonic()
        if operation == "quit":
            self.closed.set()
        elif operation != "beat":
            try:
                self._do(operation, request)
            except Refused as refusal:
                self._wire.send(event="ack", id=number, ok=False, error=str(refusal))
            except Exception as error:
                self._wire.send(event="ack", id=number, ok=False, error=f"{type(error).__name__}: {error}"[:500])
        return None

    def _do(self, operation: str, request: dict[str, Any]) -> None:
        if operation == "hold":
            self._arm.hold(str(request.get("reason"))[:200], False)
        elif operation == "gripper":
            self._arm.refuse_if_stopped()
            self._arm.gripper.start(bool(request["open"]), float(request["deadline_s"]), self._arm.finger_m())
        elif operation == "command":
            with self._wanted:
                self._request = (request, self._arm.generation)
                self._wanted.notify()
            return  # the planner answers
        else:
            raise Refused(f"unknown operation {operation!r}")
        self._wire.send(event="ack", id=request.get("id"), ok=True)

    def _plan(self) -> None:
        while True:
            with self._wanted:
                while self._request is None:
                    self._wanted.wait()
                (request, generation), self._request = self._request, None
            try:
                self._arm.move(goal_of(request), float(request["duration_s"]), generation)
            except Exception as error:
                text = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"[:500]
                self._wire.send(event="ack", id=request.get("id"), ok=False, error=text)
            else:
                self._wire.send(event="ack", id=request.get("id"), ok=True)

    def _watch(self) -> None:
        while not self.closed.is_set():
            try:
                self._arm.watch()
            except Exception as error:
                self._arm.fail(f"the motors' registers cannot be read: {type(error).__name__}: {error}"[:500])
            self.closed.wait(WATCH_S)


def goal_of(request: dict[str, Any]) -> Any:
    """The pose [4, 4] of a request. Refused when it is none."""
    goal = np.eye(4)
    goal[:3, :3] = np.array(request["rotation"], dtype=float).reshape(3, 3)
    goal[:3, 3] = np.array(request["position_m"], dtype=float)
    turn = goal[:3, :3]
    if not np.isfinite(goal).all() or np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3:
        raise Refused("the pose is not finite, or its rotation is not one")
    return goal


def take_stdout() -> Wire:
    """The vendor prints to standard output: keep the pipe for ourselves and send its words to standard error."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    return Wire(descriptor)


def connect(wire: Wire, flavour: str, model: str, name: str, timeout_s: float) -> Arm:
    """The arm, or a fatal line and the end of the process after ``timeout_s``."""
    start = "roslaunch" if flavour == "ros1" else "ros2 launch"
    file = "xsarm_control.launch" if flavour == "ros1" else "xsarm_control.launch.py"
    missing = (
        f"no answer from the arm's driver within {timeout_s:.0f} s: start it with `{start} interbotix_xsarm_control "
        f"{file} robot_model:={model}` and look at what it prints"
    )
    deadline = Deadline(wire, timeout_s, missing)
    try:
        arm = Arm(open_bot(flavour, model, name))
    except SystemExit:
        raise Refused(f"Interbotix's API ended the process: {missing}") from None
    deadline.lift()
    return arm


def main() -> int:
    """The process: connect, serve, hold, end."""
    parser = argparse.ArgumentParser(description="One WidowX on a pipe; started by vlm2vla-client.")
    parser.add_argument("--flavour", choices=("auto", "ros1", "ros2"), default="auto")
    parser.add_argument("--model", default="wx250s")
    parser.add_argument("--name", default="wx250s")
    parser.add_argument("--start-timeout-s", type=float, default=20.0)
    options = parser.parse_args()
    wire = take_stdout()
    try:
        flavour = find_flavour(options.flavour)
        arm = connect(wire, flavour, options.model, options.name, options.start_timeout_s)
    except Exception as error:
        traceback.print_exc()
        wire.send(event="fatal", error=str(error) or type(error).__name__)
        return 3
    server = Server(wire, arm)
    # After ROS has set its own handlers: a signal must not leave before the arm holds.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: server.closed.set())
    wire.send(
        event="ready",
        protocol=PROTOCOL,
        flavour=flavour,
        model=options.model,
        finger_m=[arm.finger_lower_m, arm.finger_upper_m],
        t_s=time.monotonic(),
    )
    try:
        server.run()
    finally:
        ending = threading.Thread(target=close_bot, args=(flavour,), daemon=True)
        ending.start()
        ending.join(SHUTDOWN_S)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # ROS leaves threads behind that would keep the process
