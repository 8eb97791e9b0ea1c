"""The simulation of one scene: an arm that tracks joint commands, objects held by friction, and what a judge may ask.

A :class:`World` is deterministic: the same spec and the same calls give the same states. Nothing is welded or
teleported once it runs; :meth:`World.place` exists for setting up start conditions and training pictures only.
"""

from __future__ import annotations

import copy

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm2vla_twin import kinematics
from vlm2vla_twin.kinematics import Pose
from vlm2vla_twin.scene import (
    CAMERA_POSITION_M,
    CAMERA_XYAXES,
    CARD_HALF_SIDE_M,
    COUNTER_Z_M,
    FINGER_CLOSED_M,
    FINGER_OPEN_M,
    KINDS,
    KITCHEN,
    Bench,
    SceneSpec,
    build_model,
)

Array = NDArray[np.float64]

CONTACT_MARGIN_M = 0.003
HOME_GUESS_RAD = np.array([0.0, -0.6, 0.7, 0.0, 1.4, 0.0])
_SQUEEZE_TARGET_M = 0.012


def _rotation(vector_rad: Array) -> Array:
    """The rotation matrix [3, 3] of a rotation vector."""
    quaternion, matrix = np.empty(4), np.empty(9)
    angle = float(np.linalg.norm(vector_rad))
    axis = vector_rad / angle if angle > 0.0 else np.array([1.0, 0.0, 0.0])
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


class UnreachableError(ValueError):
    """A start condition asks for an end-effector position that the arm cannot reach with the gripper down."""


class World:
    """One toy kitchen in motion.

    Args:
        spec: what stands where.
        settle_s: seconds to run before the world is handed out, so that everything rests.
        bench: what stands fast around the arm; objects and cards belong to the kitchen's own.
    """

    def __init__(self, spec: SceneSpec, *, settle_s: float = 0.2, bench: Bench = KITCHEN) -> None:
        self.spec, self.bench = spec, bench
        self.model: mujoco.MjModel = copy.copy(build_model(bench))
        self.data = mujoco.MjData(self.model)
        self._names = tuple(item.name for item in spec.objects)
        self._body = {name: self.model.body(name).id for name in KINDS}
        self._address = {name: int(self.model.jnt_qposadr[self.model.body(name).jntadr[0]]) for name in KINDS}
        self._pads = {self.model.geom(f"{side}_pad").id for side in ("left", "right")}
        self._arm_geoms = {
            index for index in range(self.model.ngeom) if self.model.geom_contype[index] == 2 or index in self._pads
        }
        self._site = self.model.site("ee").id
        self._counter, self._wall = self.model.geom("counter").id, self.model.geom("wall").id
        names = ("counter", "wall", *(f"box_{index}" for index in range(len(bench.boxes))))
        self._fixtures = {self.model.geom(name).id: name for name in names}
        self._dress(spec)
        self._arrange(spec)
        self.step(settle_s)
        self.data.time = 0.0

    # --- setting up -----------------------------------------------------------------------------------------------

    def _dress(self, spec: SceneSpec) -> None:
        """Colours, light and camera of the spec, written into this world's own copy of the model."""
        model = self.model
        for item in spec.objects:
            rgb = item.rgb or KINDS[item.name].rgb
            for index in range(model.ngeom):
                name = model.geom(index).name
                if name.startswith(f"{item.name}_") and name.endswith("_g"):
                    model.geom_rgba[index, :3] = rgb
        model.geom_rgba[self._counter, :3] = spec.counter_rgb
        model.geom_rgba[self._wall, :3] = spec.wall_rgb
        model.vis.headlight.ambient[:] = 0.32 * spec.light
        model.vis.headlight.diffuse[:] = 0.35 * spec.light
        model.light_diffuse[0] = 0.55 * spec.light
        direction = np.array([spec.light_xy[0], spec.light_xy[1], -1.0])
        model.light_dir[0] = direction / np.linalg.norm(direction)
        model.cam_pos[0] = np.asarray(CAMERA_POSITION_M) + np.asarray(spec.camera_offset_m)
        x_axis, y_axis = np.asarray(CAMERA_XYAXES[:3]), np.asarray(CAMERA_XYAXES[3:])
        nominal = np.stack([x_axis, y_axis, np.cross(x_axis, y_axis)], axis=1)
        matrix = nominal @ _rotation(np.asarray(spec.camera_rotation_rad))
        mujoco.mju_mat2Quat(model.cam_quat[0], matrix.ravel())

    def _arrange(self, spec: SceneSpec) -> None:
        """Objects, cards and arm to their start; absent ones are parked behind the base, weightless and untouchable."""
        for slot, name in enumerate(KINDS):
            if name in self._names:
                item = spec.object(name)
                self.place(name, item.position_m, item.yaw_rad)
                continue
            body = self._body[name]
            self.model.body_gravcomp[body] = 1.0
            first, count = int(self.model.body_geomadr[body]), int(self.model.body_geomnum[body])
            self.model.geom_contype[first : first + count] = 0
            self.model.geom_conaffinity[first : first + count] = 0
            self.place(name, (-3.0, 0.3 * slot, -1.0), 0.0)
        for card in spec.cards:
            self.model.body_pos[self.model.body(f"card_{card.name}").id] = (*card.xy_m, COUNTER_Z_M + 0.0007)
        self.set_arm(spec.start_position_m, gripper_m=FINGER_OPEN_M if spec.start_gripper_open else FINGER_CLOSED_M)

    def place(self, name: str, position_m: ArrayLike, yaw_rad: float) -> None:
        """Put an object somewhere at rest: for start conditions and still pictures, never during a run."""
        start = self._address[name]
        self.data.qpos[start : start + 3] = np.asarray(position_m)
        self.data.qpos[start + 3 : start + 7] = (np.cos(yaw_rad / 2), 0.0, 0.0, np.sin(yaw_rad / 2))
        dof = int(self.model.body_dofadr[self._body[name]])
        self.data.qvel[dof : dof + 6] = 0.0
        mujoco.mj_forward(self.model, self.data)

    def set_arm(self, position_m: ArrayLike, *, gripper_m: float) -> None:
        """Put the arm, gripper down, at an end-effector position: for start conditions and still pictures only.

        Raises:
            UnreachableError: no joint configuration within the limits reaches ``position_m`` with the gripper down.
        """
        joints = kinematics.inverse(np.asarray(position_m), kinematics.DOWN, HOME_GUESS_RAD)
        if joints is None:
            raise UnreachableError(f"no arm pose with the gripper down at {np.round(np.asarray(position_m), 3)} m")
        self.set_joints(joints, gripper_m=gripper_m)

    def set_joints(self, joints: ArrayLike, *, gripper_m: float) -> None:
        """Put the arm at rest at joint angles [6], radians, wherever that is: as ``set_arm``, never during a run."""
        self.data.qpos[:6], self.data.qvel[:8] = joints, 0.0
        self.data.qpos[6:8] = gripper_m
        self.command_joints(joints)
        self.command_gripper(gripper_m > 0.5 * (FINGER_OPEN_M + FINGER_CLOSED_M))
        mujoco.mj_forward(self.model, self.data)

    # --- commanding -----------------------------------------------------------------------------------------------

    def command_joints(self, joints_rad: ArrayLike) -> None:
        """Set the goal of the six arm joints, shape [6], radians."""
        self.data.ctrl[:6] = np.asarray(joints_rad)

    def command_gripper(self, open_: bool) -> None:
        """Open the fingers, or close them with bounded force."""
        self.data.ctrl[6:8] = FINGER_OPEN_M if open_ else _SQUEEZE_TARGET_M

    def step(self, seconds: float) -> None:
        """Advance the physics by ``seconds`` (rounded to the time step of 2 ms)."""
        mujoco.mj_step(self.model, self.data, max(round(seconds / self.model.opt.timestep), 0))
        mujoco.mj_forward(self.model, self.data)

    # --- what the arm's own sensors say ---------------------------------------------------------------------------

    @property
    def time_s(self) -> float:
        """Simulated seconds since the start condition."""
        return float(self.data.time)

    def joints_rad(self) -> Array:
        """Measured joints, shape [6], radians."""
        return np.array(self.data.qpos[:6])

    def finger_m(self) -> float:
        """Mean distance of the two fingers from the gripper's axis, metres (0.015 closed .. 0.037 open)."""
        return float(self.data.qpos[6:8].mean())

    def gripper_fraction(self) -> float:
        """Measured opening, 1 open .. 0 closed."""
        return float(np.clip((self.finger_m() - FINGER_CLOSED_M) / (FINGER_OPEN_M - FINGER_CLOSED_M), 0.0, 1.0))

    def ee_pose(self) -> Pose:
        """Measured pose of the end effector in the base frame."""
        return Pose(np.array(self.data.site_xpos[self._site]), np.array(self.data.site_xmat[self._site]).reshape(3, 3))

    def finger_tips_m(self) -> Array:
        """Measured positions of the two finger tips, shape [2, 3], metres."""
        return kinematics.finger_tips_m(self.joints_rad(), self.finger_m())

    def contacts(self) -> frozenset[str]:
        """Which of ``counter`` and ``wall`` the gripper touches."""
        found = set()
        if float(self.finger_tips_m()[:, 2].min()) <= self.bench.counter_z_m + CONTACT_MARGIN_M:
            found.add("counter")
        for one, other in self._touching_geoms():
            for arm, thing in ((one, other), (other, one)):
                if arm in self._arm_geoms and thing == self._counter:
                    found.add("counter")
                if arm in self._arm_geoms and thing == self._wall:
                    found.add("wall")
        return frozenset(found)

    def arm_gaps_m(self, within_m: float) -> dict[tuple[str, str], float]:
        """How far the arm's moving links are from what stands fast, by (link, ``counter``, ``wall`` or ``box_N``).

        Those of at most ``within_m``; below zero where one is pressed into the other.
        """
        gaps: dict[tuple[str, str], float] = {}
        for arm in sorted(self._arm_geoms):
            body = int(self.model.geom_bodyid[arm])
            if self.model.body_weldid[body] == 0:
                continue
            link = self.model.body(body).name
            for fixture, thing in self._fixtures.items():
                gap_m = mujoco.mj_geomDistance(self.model, self.data, arm, fixture, within_m, None)
                if gap_m < within_m:
                    gaps[link, thing] = min(gap_m, gaps.get((link, thing), gap_m))
        return gaps

    # --- what only a judge or a demonstrator may ask --------------------------------------------------------------

    def object_names(self) -> tuple[str, ...]:
        """The objects of this scene."""
        return self._names

    def object_pose(self, name: str) -> tuple[Array, float]:
        """Centre [3] in metres and yaw in radians of an object."""
        body = self._body[name]
        rotation = np.array(self.data.xmat[body]).reshape(3, 3)
        return np.array(self.data.xpos[body]), float(np.arctan2(rotation[1, 0], rotation[0, 0]))

    def card_xy(self, name: str) -> Array:
        """Centre [2] in metres of a picture card."""
        for card in self.spec.cards:
            if card.name == name:
                return np.asarray(card.xy_m, dtype=np.float64)
        raise KeyError(f"scene {self.spec.seed} has no card {name!r}")

    def object_speed_m_s(self, name: str) -> float:
        """Linear speed of an object's centre."""
        dof = int(self.model.body_dofadr[self._body[name]])
        return float(np.linalg.norm(self.data.qvel[dof : dof + 3]))

    def touching(self, name: str) -> bool:
        """Whether any part of the gripper touches the object."""
        return any(
            (one in self._arm_geoms and self.model.geom_bodyid[other] == self._body[name])
            or (other in self._arm_geoms and self.model.geom_bodyid[one] == self._body[name])
            for one, other in self._touching_geoms()
        )

    def grasped(self, name: str) -> bool:
        """Whether both finger pads press on the object."""
        body, pads = self._body[name], set()
        for one, other in self._touching_geoms():
            for pad, thing in ((one, other), (other, one)):
                if pad in self._pads and self.model.geom_bodyid[thing] == body:
                    pads.add(pad)
        return len(pads) == 2

    def touches(self, name: str, other: str) -> bool:
        """Whether an object touches another one, or the ``counter``."""
        below = {self._counter} if other == "counter" else set(self._geoms(other))
        mine = set(self._geoms(name))
        return any((a in mine and b in below) or (b in mine and a in below) for a, b in self._touching_geoms())

    def resting_on(self, name: str, support: str) -> bool:
        """Whether ``name`` touches ``support`` (an object, or ``counter``) and is not touched by the gripper."""
        return self.touches(name, support) and not self.touching(name)

    def inside(self, name: str, target: str) -> bool:
        """Whether the centre of ``name`` lies over ``target`` (``plate``, ``pan``) or over a card."""
        centre = self.object_pose(name)[0]
        if target in KINDS:
            place = self.object_pose(target)[0]
            return bool(np.linalg.norm(centre[:2] - place[:2]) <= 0.062 and abs(centre[2] - place[2]) <= 0.05)
        return bool(np.max(np.abs(centre[:2] - self.card_xy(target))) <= CARD_HALF_SIDE_M)

    # --- whole states ---------------------------------------------------------------------------------------------

    def state(self) -> Array:
        """The full physics state, to hand to :meth:`restore` of a world of the same spec."""
        size = mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION)
        buffer = np.empty(size)
        mujoco.mj_getState(self.model, self.data, buffer, mujoco.mjtState.mjSTATE_INTEGRATION)
        return buffer

    def restore(self, state: Array) -> None:
        """Go back to a state taken from :meth:`state`."""
        mujoco.mj_setState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(self.model, self.data)

    def _geoms(self, name: str) -> range:
        body = self._body[name]
        first = int(self.model.body_geomadr[body])
        return range(first, first + int(self.model.body_geomnum[body]))

    def _touching_geoms(self) -> list[tuple[int, int]]:
        contact = self.data.contact
        pairs = contact.geom[contact.dist <= 0.001]
        return [(int(a), int(b)) for a, b in pairs]
