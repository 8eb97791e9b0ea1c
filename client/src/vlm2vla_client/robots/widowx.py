"""The WidowX 250S through Interbotix's ROS packages, in a process of its own under ROS's Python.

This file is the client's side and needs no ROS; ``widowx_arm_process.py`` is the other. Neither has been run on a
physical arm: they were tested against doubles that reproduce the vendor's traps (tests/client/vendor_doubles).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.robots.arm_lock import ArmLock
from vlm2vla_client.robots.arm_pipe import ArmPipe
from vlm2vla_client.robots.base import RobotCapabilities
from vlm2vla_client.safety_types import RobotState
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]

ARM_PROCESS: Final = Path(__file__).with_name("widowx_arm_process.py")
PROTOCOL: Final = 1
ARRIVAL_TOLERANCE_M: Final = 0.010
MAX_CLOCK_GAP_S: Final = 1.0
#: After this rest the motors' current is what gravity takes: the baseline that contact is read against.
REST_S: Final = 0.3
_SHOULDER_AND_ELBOW: Final = (1, 2)
#: Scripts are arguments, never part of the command's text; catkin's would read our arguments as their own ("set --").
_SOURCE_AND_RUN: Final = (
    'arm_n=$1; shift; arm_all=("$@"); set --; '
    'for ((arm_i = 0; arm_i < arm_n; arm_i++)); do '
    '[ -r "${arm_all[arm_i]}" ] || { echo "no such setup script: ${arm_all[arm_i]}" >&2; exit 4; }; '
    '. "${arm_all[arm_i]}"; done; exec "${arm_all[@]:arm_n}"'
)


@dataclass(frozen=True)
class WidowXSettings:
    """``[widowx]`` of client.toml.

    Attributes:
        python: ROS's interpreter, not the client's.
        setup: scripts to source first: ROS's own, then the workspace that holds Interbotix's packages.
        flavour: "ros1", "ros2", or "auto" for whichever that Python finds.
        model, name: as given to the driver's launch file (``robot_model``, ``robot_name``).
        start_timeout_s: how long the driver may take to answer.
        contact_effort_ma: current of shoulder or elbow beyond that at rest which counts as touching something.
        environment: variables for the arm process, over the client's own.
    """

    python: str = "/usr/bin/python3"
    setup: tuple[str, ...] = ()
    flavour: str = "auto"
    model: str = "wx250s"
    name: str = "wx250s"
    start_timeout_s: float = 20.0
    contact_effort_ma: float = 300.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could not start."""
        if self.flavour not in ("auto", "ros1", "ros2"):
            raise ConfigurationError(f"[widowx] flavour must be auto, ros1 or ros2, received {self.flavour!r}")
        if not self.start_timeout_s > 0.0 or not self.contact_effort_ma > 0.0:
            raise ConfigurationError("[widowx] start_timeout_s and contact_effort_ma must be above 0")

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> WidowXSettings:
        """From client.toml's table. Raises ConfigurationError for an unknown key or a wrong type."""
        types = {"python": str, "setup": list, "flavour": str, "model": str, "name": str, "environment": dict}
        known = {item.name for item in fields(cls)}
        for key, value in table.items():
            if key not in known:
                raise ConfigurationError(f"[widowx]: unknown key {key!r}; known are {', '.join(sorted(known))}")
            wanted: Any = types.get(key, (int, float))
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ConfigurationError(f"[widowx] {key}: wrong type {type(value).__name__}")
        given = dict(table)
        if "setup" in given:
            given["setup"] = tuple(str(path) for path in given["setup"])
        return cls(**given)

    def command(self) -> list[str]:
        """The arm process's command line."""
        start = [self.python, "-u", str(ARM_PROCESS), "--flavour", self.flavour, "--model", self.model]
        start += ["--name", self.name, "--start-timeout-s", str(self.start_timeout_s)]
        if not self.setup:
            return start
        return ["/bin/bash", "-c", _SOURCE_AND_RUN, "arm", str(len(self.setup)), *self.setup, *start]

    def variables(self) -> dict[str, str]:
        """The client's environment without its own Python, so that ROS's interpreter finds ROS's packages."""
        ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        return {**{key: value for key, value in os.environ.items() if key not in ours}, **self.environment}


def infer_contacts(
    effort_ma: FloatArray, rest_ma: FloatArray, direction_m: FloatArray, threshold_ma: float
) -> frozenset[str]:
    """What the arm pushes against: from motor currents [6] (mA), now and at rest before, and the way it goes [3].

    Only a hint: friction, acceleration and load look the same. What it finds can stop a motion, never start one.
    """
    excess = np.abs(effort_ma - rest_ma)[list(_SHOULDER_AND_ELBOW)]
    if not bool((excess > threshold_ma).any()):
        return frozenset()
    touched = set()
    if direction_m[2] < -1e-4:
        touched.add("counter")
    if direction_m[0] > 1e-4:
        touched.add("wall")
    return frozenset(touched)


class WidowXRobot:
    """A WidowX on a pipe. States carry the time of measurement on the machine's monotonic clock (``SystemClock``)."""

    def __init__(self, settings: WidowXSettings, lock: ArmLock | None = None) -> None:
        self._settings = settings
        self._pipe = ArmPipe(settings.command(), settings.variables())
        self._lock = lock or ArmLock(settings.name)
        self._fingers_m = (kinematics.FINGER_MIN_M, kinematics.FINGER_MAX_M)
        self._direction_m = np.zeros(3)
        self._rest_ma: FloatArray | None = None
        self._busy_until_s = 0.0
        self._closed = False

    @property
    def capabilities(self) -> RobotCapabilities:
        """Physical; arrives within 10 mm."""
        return RobotCapabilities("widowx", physical=True, arrival_tolerance_m=ARRIVAL_TOLERANCE_M)

    def connect(self) -> None:
        """Take the arm's lock and start its process. Does not move. Blocks for at most ``start_timeout_s`` and a bit.

        Raises RobotError: another client has the arm, no ROS, no driver, a version of another protocol.
        """
        self._lock.acquire()
        try:
            ready = self._pipe.start(self._settings.start_timeout_s + 5.0)
            if ready.get("protocol") != PROTOCOL:
                raise RobotError(f"the arm process speaks {ready.get('protocol')}, expected {PROTOCOL}: reinstall")
            if abs(float(ready["t_s"]) - time.monotonic()) > MAX_CLOCK_GAP_S:
                raise RobotError("the arm process has another clock: it must run on this machine")
            low, high = (float(v) for v in ready["finger_m"])
            self._fingers_m = (low, high)
        except BaseException:
            self._pipe.close()
            self._lock.release()
            raise

    def state(self) -> RobotState:
        """The newest measurement, at most one period of 0.02 s behind the driver's."""
        line = self._pipe.check()
        joints = np.array(line["joints_rad"], dtype=np.float64)
        rotation = np.array(line["rotation"], dtype=np.float64).reshape(3, 3)
        position = np.array(line["position_m"], dtype=np.float64)
        low, high = self._fingers_m
        finger_m = float(line["finger_m"])
        return RobotState(
            ee_position_m=position,
            ee_rotation=rotation,
            finger_tips_m=kinematics.tips_of_pose(kinematics.Pose(position, rotation), finger_m),
            joints_rad=joints,
            gripper=min(max((finger_m - low) / (high - low), 0.0), 1.0),
            stamp_s=float(line["t_s"]),
        )

    @property
    def holds_object(self) -> bool:
        """Whether the fingers stopped short of closed: something is between them."""
        return bool(self._pipe.check()["object"])

    def contacts(self) -> frozenset[str]:
        """Inferred from current (see ``infer_contacts``); nothing before the first move."""
        line = self._pipe.check()
        if self._rest_ma is None:
            return frozenset()
        effort = np.array(line["effort_ma"], dtype=np.float64)
        return infer_contacts(effort, self._rest_ma, self._direction_m, self._settings.contact_effort_ma)

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        """Start a move. Raises RobotError: no joints reach the pose, one would be too fast, or the arm is at fault."""
        line, now_s = self._pipe.check(), time.monotonic()
        if self._rest_ma is None or now_s - self._busy_until_s > REST_S:
            self._rest_ma = np.array(line["effort_ma"], dtype=np.float64)
        position = np.asarray(position_m, dtype=np.float64)
        self._direction_m = position - np.array(line["position_m"], dtype=np.float64)
        self._busy_until_s = now_s + duration_s
        self._pipe.ask(
            "command",
            position_m=position.tolist(),
            rotation=np.asarray(rotation, dtype=np.float64).ravel().tolist(),
            duration_s=float(duration_s),
        )

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        """Open or close with bounded effort; the arm process stops driving when the fingers arrive or stop."""
        self._pipe.check()
        self._pipe.ask("gripper", open=bool(open_), deadline_s=float(deadline_s))

    def hold(self, reason: str) -> None:
        """Goal := measured joints. Raises RobotError when the arm process is gone: the motors keep their last goal."""
        if self._closed:
            return
        self._direction_m = np.zeros(3)
        self._pipe.hold(reason[:200])

    def close(self) -> None:
        """Hold, end the arm process, give the lock back; the arm stays powered."""
        self._closed = True
        self._pipe.close()  # the process holds before it ends
        self._lock.release()
