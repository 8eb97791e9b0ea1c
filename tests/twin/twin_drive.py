"""A minimal arm driver for tests of the twin: straight lines at a safe speed, gripper down, no policy in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlm2vla_twin import kinematics
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import COUNTER_Z_M, KINDS, SceneSpec, resting

CONTROL_S = 0.02
SPEED_M_S = 0.15


def scene(*names_xy: tuple[str, float, float], seed: int = 0) -> SceneSpec:
    return SceneSpec(seed=seed, objects=tuple(resting(name, (x, y)) for name, x, y in names_xy))


class Drive:
    """Moves a world's arm; ``observe`` is called after every 20 ms of physics."""

    def __init__(self, world: World, observe: Callable[[], None] = lambda: None) -> None:
        self.world, self.observe = world, observe
        self.target_m = np.array(world.ee_pose().position_m)
        self.rotation = kinematics.DOWN

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / CONTROL_S)):
            self.world.step(CONTROL_S)
            self.observe()

    def to(self, x: float, y: float, z: float) -> None:
        goal = np.array([x, y, z])
        start, steps = self.target_m, max(1, round(float(np.linalg.norm(goal - self.target_m)) / SPEED_M_S / CONTROL_S))
        for index in range(1, steps + 1):
            self.target_m = start + (goal - start) * index / steps
            joints = kinematics.inverse(self.target_m, self.rotation, self.world.joints_rad(), 1e-5, 1e-4)
            assert joints is not None, f"unreachable {self.target_m}"
            self.world.command_joints(joints)
            self.wait(CONTROL_S)
        self.wait(0.3)

    def by(self, dx: float, dy: float, dz: float) -> None:
        self.to(*(self.target_m + np.array([dx, dy, dz])))

    def gripper(self, open_: bool) -> None:
        self.world.command_gripper(open_)
        self.wait(0.6)

    def grasp(self, name: str) -> None:
        x, y, _ = self.world.object_pose(name)[0]
        self.gripper(True)
        self.to(float(x), float(y), 0.08)
        self.to(float(x), float(y), 0.010)
        self.gripper(False)

    def put(self, name: str, at: Sequence[float], z: float = 0.024) -> None:
        self.grasp(name)
        self.by(0.0, 0.0, 0.10)
        self.to(float(at[0]), float(at[1]), float(self.target_m[2]))
        self.to(float(at[0]), float(at[1]), z)
        self.gripper(True)
        self.by(0.0, 0.0, 0.08)


def height_m(world: World, name: str) -> float:
    """How far an object's centre is above where it rests on the counter."""
    return float(world.object_pose(name)[0][2]) - COUNTER_Z_M - KINDS[name].rest_z_m
