"""bridge_data_robot's client and server in one object, with their traps. Imitated behaviour, our own code.

Sources, in rail-berkeley/bridge_data_robot: ``widowx_envs/widowx_envs/widowx_env_service.py`` (WidowXClient,
WidowXActionServer), ``widowx_envs/widowx_envs/base/robot_base_env.py`` (step, _next_qpos, current_obs),
``widowx_envs/widowx_controller/src/widowx_controller/widowx_controller.py`` (move_to_eep).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]
LOW, HIGH = np.array([0.1, -0.15, -0.1]), np.array([0.45, 0.25, 0.18])
MOVE_S = 0.2
START_RAD = (0.0, 0.02180, 0.18424, 0.0, 1.36474, 0.0)


class BridgeDouble:
    """``WidowXClient``; every request takes ``latency_s``."""

    def __init__(self, latency_s: float = 0.02, initialised: bool = True) -> None:
        self.latency_s, self.initialised = latency_s, initialised
        self.connected = True
        self.blocked = False
        self.unreachable_beyond_x_m = 9.0
        self.steps: list[FloatArray] = []
        self._from = self._goal = np.array(START_RAD)
        self._began_s = 0.0
        self._rotation = kinematics.forward(START_RAD).rotation
        self._target = kinematics.forward(START_RAD).position_m
        self._gripper = 1.0

    def joints(self) -> FloatArray:
        """What the encoders say."""
        share = min(max((time.monotonic() - self._began_s) / MOVE_S, 0.0), 1.0)
        return np.asarray(self._from + share * (self._goal - self._from))

    def target(self) -> FloatArray:
        """The server's last target."""
        return self._target

    def step_action(self, action: FloatArray, blocking: bool = False) -> int:
        """One relative step.

        Trap (robot_base_env.step): clipped to 5 cm an axis. Trap (_next_qpos): added to the last target, not to where
        the arm is, and clipped to the box without an error. Trap (widowx_controller.move_to_eep): no joints, no motion,
        and SUCCESS all the same; the last target moves on as if it had (robot_base_env.step).
        """
        time.sleep(self.latency_s)
        if not self.connected:
            return 0
        if not self.initialised:
            return 3
        self.steps.append(np.array(action))
        shift = np.clip(action[:3], -0.05, 0.05)
        self._target = np.clip(self._target + shift, LOW, HIGH)
        self._gripper = float(action[6])
        here = self.joints()
        found = kinematics.inverse(self._target, self._rotation, here, 1e-4, 1e-3)
        if found is not None and self._target[0] <= self.unreachable_beyond_x_m and not self.blocked:
            self._from, self._goal, self._began_s = here, found, time.monotonic()
        return 1

    def get_observation(self) -> dict[str, Any] | None:
        """Trap (WidowXActionServer.__observe): before init it is noise and an empty state, not an error."""
        time.sleep(self.latency_s)
        if not self.connected:
            return None
        if not self.initialised:
            return {"image": np.zeros((480, 640, 3), np.uint8), "state": {}}
        position = kinematics.forward(self.joints()).position_m
        return {
            "qpos": self.joints(),
            "full_state": np.array([*position, 0.0, 0.0, 0.0, self._gripper]),
            "desired_state": np.array([*self._target, 0.0, 0.0, 0.0, self._gripper]),
            "low_bound": np.array([*LOW, -1.57, 0.0]),
            "high_bound": np.array([*HIGH, 1.57, 0.0]),
        }

    def stop(self) -> None:
        """Trap (WidowXClient.stop): ends the connection; the arm goes on."""
        self.connected = False
