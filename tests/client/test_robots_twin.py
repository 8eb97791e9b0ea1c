"""The twin as a robot: time, motion, grip, hold; and an executor on it, with real physics."""

import time

import numpy as np
import pytest
from robot_fakes import limits, policy_context

from vlm2vla_client.errors import RobotError
from vlm2vla_client.executor import Executor, MotionStart, Outcome
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.robots.twin import TwinClock, TwinRobot
from vlm2vla_twin.kinematics import DOWN
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import COUNTER_Z_M, WALL_X_M, SceneSpec, resting

SEED = 500_001


class Kitchen:
    def __init__(self, *, realtime: bool = False, carrot: tuple[float, float] | None = None) -> None:
        objects = () if carrot is None else (resting("carrot", carrot),)
        self.world = World(SceneSpec(seed=SEED, objects=objects))
        self.clock = TwinClock(self.world, realtime=realtime)
        self.robot = TwinRobot(self.world, self.clock)
        self.robot.connect()
        self.limits = limits(counter_z_m=COUNTER_Z_M, wall_x_m=WALL_X_M)
        self.executor = Executor(self.robot, self.clock, self.limits)

    @property
    def at(self) -> np.ndarray:
        return np.array(self.robot.state().ee_position_m)

    def run(self, rows: list[list[float]]) -> Outcome:
        start = MotionStart(self.clock.now_s(), self.at)
        return self.executor.run_chunk(rows, policy_context(), start).outcome


@pytest.mark.clock
def test_sleeping_advances_physics_and_the_clock_by_the_same_time() -> None:
    kitchen = Kitchen()
    seen: list[float] = []
    kitchen.clock.on_advance.append(lambda: seen.append(kitchen.world.time_s))
    before_s, began = kitchen.clock.now_s(), time.monotonic()
    kitchen.clock.sleep_s(2.0)
    wall_s = time.monotonic() - began
    assert kitchen.world.time_s == pytest.approx(2.0, abs=1e-6)
    assert kitchen.clock.now_s() - before_s == pytest.approx(2.0, abs=0.1)
    assert len(seen) == 100 and seen == sorted(seen)
    assert wall_s < 1.5, "instant, not real time"


def test_zero_and_negative_sleeps_do_nothing() -> None:
    kitchen = Kitchen()
    kitchen.clock.sleep_s(0.0)
    kitchen.clock.sleep_s(-1.0)
    assert kitchen.world.time_s == 0.0


@pytest.mark.clock
def test_realtime_takes_the_time_it_says() -> None:
    kitchen = Kitchen(realtime=True)
    began, before_s = time.monotonic(), kitchen.clock.now_s()
    kitchen.clock.sleep_s(0.3)
    assert time.monotonic() - began >= 0.28
    assert kitchen.clock.now_s() - before_s == pytest.approx(0.3, abs=0.1)


def test_wall_time_counts_too_so_that_answers_age() -> None:
    kitchen = Kitchen()
    before_s = kitchen.clock.now_s()
    time.sleep(0.05)
    assert kitchen.clock.now_s() - before_s >= 0.05
    assert kitchen.world.time_s == 0.0


def test_a_commanded_pose_is_reached_in_its_time() -> None:
    kitchen = Kitchen()
    goal = kitchen.at + np.array([0.03, 0.04, -0.02])
    kitchen.robot.command(goal, DOWN, 0.5)
    kitchen.clock.sleep_s(0.25)
    assert 0.01 < float(np.linalg.norm(kitchen.at - goal)) < 0.05, "on its way"
    kitchen.clock.sleep_s(0.75)
    assert kitchen.at == pytest.approx(goal, abs=kitchen.robot.capabilities.arrival_tolerance_m)


def test_unreachable_and_unconnected_commands_are_errors() -> None:
    kitchen = Kitchen()
    with pytest.raises(RobotError, match="no joint angles"):
        kitchen.robot.command(np.array([0.9, 0.0, 0.1]), DOWN, 0.5)
    kitchen.robot.close()
    kitchen.robot.close()
    with pytest.raises(RobotError, match="not connected"):
        kitchen.robot.command(kitchen.at, DOWN, 0.5)


def test_hold_stops_a_motion_and_keeps_the_grip() -> None:
    kitchen = Kitchen()
    kitchen.robot.set_gripper(False, 1.0)
    kitchen.clock.sleep_s(0.5)
    kitchen.robot.command(kitchen.at + np.array([0.05, 0.0, 0.0]), DOWN, 0.5)
    kitchen.clock.sleep_s(0.2)
    kitchen.robot.hold("test")
    stopped = kitchen.at
    kitchen.clock.sleep_s(1.0)
    assert float(np.linalg.norm(kitchen.at - stopped)) < 0.012
    assert kitchen.robot.state().gripper < 0.1


def test_the_state_is_consistent_and_stamped_now() -> None:
    kitchen = Kitchen()
    state = kitchen.robot.state()
    assert abs(state.stamp_s - kitchen.clock.now_s()) < 0.05
    assert np.mean(np.asarray(state.finger_tips_m), axis=0) == pytest.approx(np.asarray(state.ee_position_m), abs=1e-3)
    assert state.gripper == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    "row", [[0.05, 0.0, 0.0, 1], [0.0, 0.05, 0.0, 1], [0.0, 0.0, -0.05, 1], [-0.03, -0.02, 0.02, 1]]
)
def test_rows_move_the_arm_by_what_they_say(row: list[float]) -> None:
    kitchen = Kitchen()
    before = kitchen.at
    assert kitchen.run([row]) is Outcome.COMPLETED
    assert kitchen.at - before == pytest.approx(row[:3], abs=0.003)


def test_errors_of_arrival_do_not_add_up_over_a_chunk() -> None:
    kitchen = Kitchen()
    before = kitchen.at
    assert (
        kitchen.run([[0.02, 0.03, -0.01, 1], [0.02, -0.03, 0.01, 1]] * 2 + [[-0.04, 0.0, 0.0, 1]] * 2)
        is Outcome.COMPLETED
    )
    assert kitchen.at == pytest.approx(before, abs=0.004)


def test_seven_numbers_turn_the_gripper_about_its_place() -> None:
    kitchen = Kitchen()
    before = kitchen.at
    assert kitchen.run([[0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 1]] * 2) is Outcome.COMPLETED
    kitchen.clock.sleep_s(0.5)
    side = np.asarray(kitchen.robot.state().ee_rotation)[:, 1]
    assert np.arctan2(-side[0], side[1]) == pytest.approx(0.5, abs=0.03)
    assert kitchen.at == pytest.approx(before, abs=0.004)


def test_pushing_down_ends_above_the_counter() -> None:
    kitchen = Kitchen()
    for _ in range(3):
        kitchen.run([[0.0, 0.0, -0.05, 1]] * 4)
    lowest = float(np.asarray(kitchen.robot.state().finger_tips_m)[:, 2].min())
    assert COUNTER_Z_M < lowest < COUNTER_Z_M + 0.008


def test_a_carrot_can_be_picked_through_the_filter() -> None:
    kitchen = Kitchen(carrot=(0.30, 0.05))
    down = [[0.0, 0.05, 0.0, 1], [0.0, 0.0, -0.05, 1], [0.0, 0.0, -0.05, 1], [0.0, 0.0, -0.04, 1]]
    assert kitchen.run(down) is Outcome.COMPLETED
    assert kitchen.run([[0.0, 0.0, 0.0, 0], [0.0, 0.0, 0.05, 0], [0.0, 0.0, 0.05, 0]]) is Outcome.COMPLETED
    height = float(kitchen.world.object_pose("carrot")[0][2])
    assert height > 0.05


@pytest.mark.clock
def test_a_chunk_costs_little_wall_time() -> None:
    kitchen = Kitchen()
    began = time.perf_counter()
    kitchen.run([[0.02, 0.02, 0.0, 1], [-0.02, -0.02, 0.0, 1]] * 4)
    assert time.perf_counter() - began < 2.0


def test_the_twin_is_a_robot() -> None:
    robot: Robot = Kitchen().robot
    assert robot.capabilities.physical is False and robot.capabilities.arrival_tolerance_m == 0.003
