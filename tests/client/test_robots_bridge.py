"""The bridge_data_robot backend against its double: what the server hides is found."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from arm_bench import patiently, wait_until
from robot_fakes import limits, policy_context
from vendor_doubles.bridge import BridgeDouble

from vlm2vla_client.clock import SystemClock
from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.executor import ChunkResult, Executor, MotionStart, Outcome
from vlm2vla_client.robots.arm_lock import ArmLock
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.robots.bridge import BridgeRobot, BridgeSettings
from vlm2vla_client.safety_geometry import rotation_of
from vlm2vla_twin import kinematics


def robot_on(double: BridgeDouble, folder: Path) -> BridgeRobot:
    """Connected."""
    robot = BridgeRobot(BridgeSettings(), ArmLock("bridge", folder), lambda _: double)
    robot.connect()
    return robot


def run(robot: Robot, rows: list[list[float]], speed: float = 0.5) -> ChunkResult:
    """One chunk; slower than the limit, since the server follows at 5 Hz."""
    clock = SystemClock()
    begin = MotionStart(clock.now_s(), np.asarray(robot.state().ee_position_m))
    return Executor(robot, clock, limits(), speed=speed).run_chunk(rows, policy_context(), begin)


def test_it_connects_without_a_request_that_moves(tmp_path: Path) -> None:
    double = BridgeDouble()
    robot = robot_on(double, tmp_path)
    assert robot.capabilities.physical and robot.contacts() == frozenset()
    assert np.asarray(robot.state().ee_position_m) == pytest.approx([0.30, 0.0, 0.15], abs=1e-3)
    robot.close()
    robot.close()
    assert not double.steps and not double.connected


@patiently
def test_a_chunk_of_40_rows_ends_within_1_mm_of_its_path(tmp_path: Path) -> None:
    double = BridgeDouble()
    robot = robot_on(double, tmp_path)
    begin = np.asarray(robot.state().ee_position_m)
    steps = [(1, 0, 0), (0, 1, 0), (0, 0, -1), (-1, 0, 0), (0, -1, 0), (0, 0, 1)]
    rows = [[0.01 * v for v in steps[i % 6]] + [1.0] for i in range(39)] + [[0.012, -0.008, -0.02, 1.0]]
    result = run(robot, rows)
    assert result.outcome is Outcome.COMPLETED, result.reason
    wanted = begin + np.sum([row[:3] for row in rows], axis=0)
    wait_until(lambda: bool(np.linalg.norm(np.asarray(robot.state().ee_position_m) - wanted) < 0.001), 2.0)
    assert max(float(np.abs(step[:3]).max()) for step in double.steps) <= 0.05
    robot.close()


def test_the_naive_call_believes_a_success_that_moved_nothing() -> None:
    double = BridgeDouble()
    double.blocked = True
    before = double.joints()
    assert double.step_action(np.array([0.03, 0, 0, 0, 0, 0, 1.0])) == 1
    observation = double.get_observation()
    assert observation is not None
    assert double.joints() == pytest.approx(before)
    assert observation["desired_state"][0] == pytest.approx(0.33, abs=1e-3)


def test_an_inverse_kinematics_failure_that_the_server_hides_is_found(tmp_path: Path) -> None:
    double = BridgeDouble()
    robot = robot_on(double, tmp_path)
    double.unreachable_beyond_x_m = 0.31
    with pytest.raises(RobotError, match="inverse kinematics failed"):
        run(robot, [[0.04, 0.0, 0.0, 1.0]])
    here = kinematics.forward(double.joints()).position_m  # held although the state is an error
    wait_until(lambda: bool(np.allclose(double.target(), here, atol=1e-3)), 1.0)
    robot.close()
    double = BridgeDouble()
    double.blocked = True
    robot = robot_on(double, tmp_path)
    state = robot.state()
    robot.command(np.asarray(state.ee_position_m) + np.array([0.0, 0.03, 0.0]), np.asarray(state.ee_rotation), 0.2)

    def failed() -> bool:
        try:
            robot.state()
        except RobotError as error:
            return "inverse kinematics failed" in str(error)
        return False

    wait_until(failed, 4.0)
    robot.close()


def test_what_the_server_would_clip_is_refused(tmp_path: Path) -> None:
    double = BridgeDouble()
    robot = robot_on(double, tmp_path)
    state = robot.state()
    with pytest.raises(RobotError, match="outside the bridge server's box"):
        robot.command(np.array([0.30, 0.0, 0.25]), np.asarray(state.ee_rotation), 0.2)
    turned = rotation_of(np.array([[0.0, 0.0, 0.3]]))[0] @ np.asarray(state.ee_rotation)
    with pytest.raises(RobotError, match="without turning"):
        robot.command(np.asarray(state.ee_position_m), turned, 0.2)
    robot.command(np.asarray(state.ee_position_m) + np.array([0.0, 0.12, 0.0]), np.asarray(state.ee_rotation), 0.6)
    wait_until(lambda: len(double.steps) == 3, 3.0)
    assert all(abs(step[1]) <= 0.05 for step in double.steps)
    wait_until(lambda: abs(float(np.asarray(robot.state().ee_position_m)[1]) - 0.12) < 1e-3, 3.0)
    robot.close()


def test_hold_brings_the_servers_target_back_to_where_the_arm_is(tmp_path: Path) -> None:
    double = BridgeDouble()
    robot = robot_on(double, tmp_path)
    state = robot.state()
    robot.command(np.asarray(state.ee_position_m) + np.array([0.0, 0.15, 0.0]), np.asarray(state.ee_rotation), 0.6)
    wait_until(lambda: len(double.steps) == 1, 2.0)
    time.sleep(0.05)
    robot.hold("a person said so")
    wait_until(lambda: len(double.steps) == 2, 1.0)
    robot.hold("again")
    time.sleep(0.5)
    assert len(double.steps) == 2
    assert float(np.asarray(robot.state().ee_position_m)[1]) < 0.06
    robot.set_gripper(False, 1.5)
    wait_until(lambda: robot.state().gripper == 0.0, 2.0)
    assert double.steps[-1] == pytest.approx([0, 0, 0, 0, 0, 0, 0])
    robot.close()


def test_a_server_that_is_gone_or_was_never_initialised_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RobotError, match="no robot yet"):
        robot_on(BridgeDouble(initialised=False), tmp_path)
    double = BridgeDouble()
    double.connected = False
    with pytest.raises(RobotError, match="does not answer"):
        robot_on(double, tmp_path)
    double = BridgeDouble()
    robot = robot_on(double, tmp_path)
    double.latency_s = 5.0

    def silent() -> bool:
        try:
            robot.state()
        except RobotError as error:
            return "silent" in str(error)
        return False

    wait_until(silent, 2.0)
    double.connected = False
    robot.close()


def test_without_the_vendors_client_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(RobotError, match="edgeml"):
        BridgeRobot(BridgeSettings(), ArmLock("bridge", tmp_path)).connect()


def test_settings_refuse_what_they_do_not_know() -> None:
    assert BridgeSettings.from_table({"host": "pc", "port": 5557}).port == 5557
    for table in ({"hots": "pc"}, {"port": "5556"}, {"port": True}):
        with pytest.raises(ConfigurationError, match="bridge"):
            BridgeSettings.from_table(table)
