"""A WidowX behind bridge_data_robot's server (github.com/rail-berkeley/bridge_data_robot, widowx_env_service.py).

That server steps at 5 Hz, adds each displacement to its last target, clips it to 5 cm an axis and to its box without
a word, answers SUCCESS when its inverse kinematics failed, and, when a motor draws too much, opens the gripper and
drives to its neutral pose by itself. So displacements stay inside what it would clip, its own target is read back
before each, and the pose reached is compared with the one asked for. It is not turned: 4-number rows only.

Its answers take as long as they take: hold is its next request, up to 0.3 s, not 50 ms. Where the driver can be reached
directly, use ``widowx``. Never run on a physical arm.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.robots.arm_lock import ArmLock
from vlm2vla_client.robots.base import RobotCapabilities
from vlm2vla_client.safety_types import RobotState
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]

PORT: Final = 5556
STEP_S: Final = 0.2
MAX_STEP_M: Final = 0.05
#: The default of ``WidowXConfigs.DefaultEnvParams``; the observation's own bounds win.
BOX_M: Final = ((0.1, -0.15, -0.1), (0.45, 0.25, 0.18))
SUCCESS: Final = 1
#: After the last step the arm has this long to come within the tolerance; otherwise a failure was hidden.
SETTLE_S: Final = 1.0
ARRIVAL_TOLERANCE_M: Final = 0.010
MAX_TURN_RAD: Final = 0.05
SILENCE_S: Final = 0.5
CONNECT_S: Final = 10.0
_STATUS: Final = {0: "no connection", 2: "execution failure", 3: "not initialised"}


class BridgeClient(Protocol):
    """The part of ``widowx_envs.widowx_env_service.WidowXClient`` that is used."""

    def step_action(self, action: FloatArray, blocking: bool = False) -> int: ...

    def get_observation(self) -> dict[str, Any] | None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class BridgeSettings:
    """``[bridge]`` of client.toml."""

    host: str = "localhost"
    port: int = PORT

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> BridgeSettings:
        """Raises ConfigurationError for an unknown key or a wrong type."""
        for key, value in table.items():
            wanted = {"host": str, "port": int}.get(key)
            if wanted is None:
                raise ConfigurationError(f"[bridge]: unknown key {key!r}; known are host, port")
            if type(value) is not wanted:
                raise ConfigurationError(f"[bridge] {key}: wrong type {type(value).__name__}")
        return cls(**table)


def open_client(settings: BridgeSettings) -> BridgeClient:
    """The vendor's client. Raises RobotError when it is not installed."""
    try:
        from widowx_envs.widowx_env_service import WidowXClient
    except ImportError as error:
        raise RobotError(
            f"bridge_data_robot's client is missing ({error}): install its widowx_envs folder, and edgeml from its "
            "author's repository (PyPI's edgeml is another program)"
        ) from None
    client: BridgeClient = WidowXClient(host=settings.host, port=settings.port)
    return client


@dataclass(frozen=True, eq=False)
class _Seen:
    """One observation: joints [6], the server's own last target [3] and gripper, its box, currents if it sent any."""

    joints_rad: FloatArray
    position_m: FloatArray
    rotation: FloatArray
    target_m: FloatArray
    gripper: float
    low_m: FloatArray
    high_m: FloatArray
    stamp_s: float


def read_observation(observation: Mapping[str, Any] | None, stamp_s: float) -> _Seen:
    """An observation as numbers. Raises RobotError when there is none, or the server's robot was never initialised."""
    if observation is None:
        raise RobotError("the bridge server does not answer: is widowx_env_service.py --server running at that host?")
    if "qpos" not in observation or "desired_state" not in observation:
        raise RobotError(
            "the bridge server has no robot yet and shows noise: initialise it with its own client first (that drives "
            "the arm to its neutral pose, so keep clear)"
        )
    joints = np.asarray(observation["qpos"], dtype=np.float64).ravel()
    target = np.asarray(observation["desired_state"], dtype=np.float64).ravel()
    state = np.asarray(observation["full_state"], dtype=np.float64).ravel()
    if joints.shape != (6,) or target.size < 7 or state.size < 7 or not np.isfinite(joints).all():
        shapes = f"{joints.shape}, {target.shape}, {state.shape}"
        raise RobotError(f"the bridge server's state has an unknown shape: {shapes}; expected 6, 7 and 7 numbers")
    pose = kinematics.forward(joints)
    low = np.asarray(observation.get("low_bound", BOX_M[0]), dtype=np.float64).ravel()[:3]
    high = np.asarray(observation.get("high_bound", BOX_M[1]), dtype=np.float64).ravel()[:3]
    return _Seen(joints, pose.position_m, pose.rotation, target[:3], float(state[6]), low, high, stamp_s)


class BridgeRobot:
    """Translations and gripper through the server; a thread of its own talks to it, one request at a time."""

    def __init__(
        self,
        settings: BridgeSettings,
        lock: ArmLock | None = None,
        open_: Callable[[BridgeSettings], BridgeClient] = open_client,
    ) -> None:
        self._settings, self._open = settings, open_
        self._lock = lock or ArmLock(f"bridge-{settings.host}-{settings.port}")
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._client: BridgeClient | None = None
        self._seen: _Seen | None = None
        self._error: RobotError | None = None
        self._goal_m: FloatArray | None = None
        self._holding = True
        self._hold_wanted = False
        self._gripper = 1.0
        self._gripper_wanted = False
        self._stepped_s = 0.0
        self._unproven = False
        self._stop = False

    @property
    def capabilities(self) -> RobotCapabilities:
        """Physical; arrives within 10 mm."""
        return RobotCapabilities("bridge", physical=True, arrival_tolerance_m=ARRIVAL_TOLERANCE_M)

    def connect(self) -> None:
        """Take the lock and wait for a first observation. Does not move: the server's ``init`` would."""
        self._lock.acquire()
        try:
            self._client = self._open(self._settings)
            self._thread = threading.Thread(target=self._talk, name="bridge", daemon=True)
            self._thread.start()
            with self._changed:
                self._changed.wait_for(lambda: self._seen is not None or self._error is not None, CONNECT_S)
            if self._seen is None:
                raise self._error or RobotError(f"no observation from the bridge server within {CONNECT_S:.0f} s")
            self._gripper = 1.0 if self._seen.gripper >= 0.5 else 0.0
        except BaseException:
            self.close()
            raise

    def state(self) -> RobotState:
        """The newest observation; stamped when it was asked for."""
        seen = self._check()
        finger_m = kinematics.FINGER_MIN_M + seen.gripper * (kinematics.FINGER_MAX_M - kinematics.FINGER_MIN_M)
        tips = kinematics.tips_of_pose(kinematics.Pose(seen.position_m, seen.rotation), finger_m)
        opening = min(max(seen.gripper, 0.0), 1.0)
        return RobotState(seen.position_m, seen.rotation, tips, seen.joints_rad, opening, seen.stamp_s)

    def contacts(self) -> frozenset[str]:
        """Unknown through this server; the filter still infers the counter from heights."""
        self._check()
        return frozenset()

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        """Go to a position, in steps of at most 5 cm every 0.2 s.

        Raises RobotError for a position outside the server's box (it would clip without a word) and for a rotation.
        """
        seen = self._check()
        goal = np.array(position_m, dtype=np.float64)
        if (goal < seen.low_m).any() or (goal > seen.high_m).any():
            raise RobotError(
                f"{np.round(goal, 3).tolist()} m is outside the bridge server's box {seen.low_m.tolist()} .. "
                f"{seen.high_m.tolist()}: narrow box_min_m and box_max_m in client.toml's [limits] to it"
            )
        cosine = 0.5 * (float(np.trace(np.asarray(rotation).T @ seen.rotation)) - 1.0)
        if float(np.arccos(np.clip(cosine, -1.0, 1.0))) > MAX_TURN_RAD:
            raise RobotError("the bridge backend moves without turning: use rows of 4 numbers, or --robot widowx")
        with self._changed:
            self._goal_m, self._holding, self._hold_wanted = goal, False, False
            self._changed.notify_all()

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        """Open or close with the next step; the server's gripper controller ends the motion by itself."""
        self._check()
        with self._changed:
            self._gripper, self._gripper_wanted = float(open_), True
            self._changed.notify_all()

    def hold(self, reason: str) -> None:
        """The measured position becomes the server's target with its next request; later holds keep that one."""
        with self._changed:
            self._goal_m, self._unproven = None, False
            if not self._holding:
                self._holding = self._hold_wanted = True
            self._changed.notify_all()
        if self._thread is None or not self._thread.is_alive():
            raise RobotError("not connected to the bridge server: the arm keeps its last target")

    def close(self) -> None:
        """Hold, end the connection, give the lock back; the arm stays powered."""
        with self._changed:
            if not self._holding:
                self._holding = self._hold_wanted = True
            self._goal_m, self._stop = None, True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(2.0)
        self._lock.release()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        client = self._client
        assert client is not None
        try:
            while True:
                self._observe(client)
                step = self._next_step()
                if step is not None:
                    status = client.step_action(step, blocking=False)
                    if status != SUCCESS:
                        raise RobotError(f"the bridge server refused a step: {_STATUS.get(status, status)}")
                with self._changed:
                    if self._stop and not self._hold_wanted:
                        break
                    self._changed.wait(0.01)
        except RobotError as error:
            self._fail(error)
        except Exception as error:  # whatever its transport raises
            self._fail(RobotError(f"the bridge server's client failed: {type(error).__name__}: {error}"))
        finally:
            client.stop()

    def _observe(self, client: BridgeClient) -> None:
        asked_s = time.monotonic()
        seen = read_observation(client.get_observation(), asked_s)
        with self._changed:
            self._seen = seen
            self._changed.notify_all()
            if self._unproven and self._goal_m is not None and asked_s - self._stepped_s > SETTLE_S:
                self._judge(float(np.linalg.norm(seen.position_m - self._goal_m)))

    def _judge(self, gap_m: float) -> None:
        """The thread goes on after a failure: the arm must still be held."""
        self._unproven = False
        if gap_m > ARRIVAL_TOLERANCE_M:
            self._error = RobotError(
                f"the arm is {1000 * gap_m:.0f} mm from where the bridge server says it put it: its inverse kinematics "
                "failed, or something is in the way. Look at the arm, then start again"
            )

    def _next_step(self) -> FloatArray | None:
        """[dx, dy, dz, 0, 0, 0, gripper] that leads the server's own target towards ours; None when it is there."""
        with self._changed:
            seen, now_s = self._seen, time.monotonic()
            assert seen is not None
            wanted = seen.position_m if self._hold_wanted else self._goal_m
            urgent = self._hold_wanted or self._gripper_wanted
            if not urgent and (wanted is None or now_s - self._stepped_s < STEP_S):
                return None
            # While holding the server's target stays where it is; only the gripper follows.
            shift = np.zeros(3) if wanted is None else wanted - seen.target_m
            if not urgent and float(np.abs(shift).max()) < 1e-4:
                return None
            largest = float(np.abs(shift).max())
            if largest > MAX_STEP_M:
                shift = shift * (MAX_STEP_M / largest)
            self._hold_wanted = self._gripper_wanted = False
            self._stepped_s, self._unproven = now_s, True
            return np.array([*shift, 0.0, 0.0, 0.0, self._gripper])

    def _fail(self, error: RobotError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _check(self) -> _Seen:
        with self._changed:
            seen, error = self._seen, self._error
        if error is not None:
            raise error
        if seen is None:
            raise RobotError("not connected: call connect() first")
        silent_s = time.monotonic() - seen.stamp_s
        if silent_s > SILENCE_S:
            raise RobotError(f"the bridge server has been silent for {silent_s:.2f} s (limit {SILENCE_S} s)")
        return seen
