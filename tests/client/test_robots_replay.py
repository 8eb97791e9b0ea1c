"""The replayed arm: where it starts, how it follows, and what recordings it can read."""

import json

import numpy as np
import pytest
from robot_fakes import ManualClock, joints_at, limits, policy_context

from vlm2vla_client.errors import RobotError
from vlm2vla_client.executor import Executor, MotionStart, Outcome
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.robots.replay import HOME_RAD, ReplayRobot, first_joints_rad
from vlm2vla_twin.kinematics import forward


def test_it_starts_at_home_over_the_counter() -> None:
    robot: Robot = ReplayRobot(ManualClock())
    robot.connect()
    assert np.asarray(robot.state().ee_position_m) == pytest.approx([0.30, 0.0, 0.15], abs=1e-3)
    assert forward(HOME_RAD).rotation[:, 0] == pytest.approx([0, 0, -1], abs=2e-2)
    assert robot.contacts() == frozenset()


def test_it_repeats_a_chunk_from_where_the_recording_began() -> None:
    clock, events = ManualClock(), list[str]()
    start = joints_at((0.25, 0.05, 0.12))
    original = ReplayRobot(clock, start)
    executor = Executor(
        original, clock, limits(), on_event=lambda kind, data: events.append(json.dumps({"kind": kind, "data": data}))
    )
    rows = [[0.03, 0.0, -0.02, 1], [0.0, -0.04, 0.0, 0]]
    begin = MotionStart(clock.now_s(), np.asarray(original.state().ee_position_m))
    assert executor.run_chunk(rows, policy_context(), begin).outcome is Outcome.COMPLETED
    joints = first_joints_rad(events)
    assert joints is not None and joints == pytest.approx(start, abs=1e-6)
    again = ReplayRobot(clock, joints)
    begin = MotionStart(clock.now_s(), np.asarray(again.state().ee_position_m))
    assert Executor(again, clock, limits()).run_chunk(rows, policy_context(), begin).outcome is Outcome.COMPLETED
    assert np.asarray(again.state().ee_position_m) == pytest.approx(
        np.asarray(original.state().ee_position_m), abs=1e-4
    )
    assert again.state().gripper == pytest.approx(0.0, abs=1e-9)


def test_a_recording_that_was_cut_in_its_last_line_is_read() -> None:
    assert first_joints_rad(['{"joints_rad": [0, 0, 0, 0, 0, 0.5]}', '{"joints_r']) == pytest.approx(
        [0, 0, 0, 0, 0, 0.5]
    )
    assert first_joints_rad(['{"kind": "request"}', '{"kind": "ro']) is None
    assert first_joints_rad(["[1, 2]", '{"joints_rad": ["a"]}']) is None


def test_a_broken_line_in_the_middle_is_an_error() -> None:
    with pytest.raises(RobotError, match=r"events\.jsonl"):
        first_joints_rad(["not json", '{"kind": "row"}'])


def test_a_start_outside_the_joint_limits_is_an_error() -> None:
    with pytest.raises(RobotError, match="joint limits"):
        ReplayRobot(ManualClock(), np.full(6, 4.0)).connect()


def test_hold_stops_on_the_way() -> None:
    clock = ManualClock()
    robot = ReplayRobot(clock)
    state = robot.state()
    robot.command(np.asarray(state.ee_position_m) + np.array([0.04, 0, 0]), np.asarray(state.ee_rotation), 1.0)
    clock.sleep_s(0.5)
    robot.hold("test")
    clock.sleep_s(5.0)
    assert float(np.asarray(robot.state().ee_position_m)[0]) == pytest.approx(0.32, abs=2e-3)
    with pytest.raises(RobotError):
        robot.command(np.array([2.0, 0, 0]), np.eye(3), 1.0)
