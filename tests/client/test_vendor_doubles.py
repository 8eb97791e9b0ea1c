"""The traps of Interbotix's API, each shown on the naive call; test_robots_widowx.py shows ours on the same double."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_bench import HERE, start_with_yaw
from vendor_doubles.interbotix import euler_of, matrix_of

from vlm2vla_twin.kinematics import DOWN

Open = Callable[..., Any]


@pytest.fixture(params=["ros1", "ros2"])
def flavour(request: pytest.FixtureRequest) -> str:
    """Traps that both flavours have."""
    return str(request.param)


@pytest.fixture
def open_bot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Constructs the vendor's manipulator in this process, as a naive program would."""
    file = tmp_path / "faults.json"

    def construct(flavour: str, *, start: bool = True, **faults: Any) -> Any:
        file.write_text(json.dumps(faults))
        forget()
        monkeypatch.setenv("VENDOR_DOUBLE_FAULTS", str(file))
        monkeypatch.syspath_prepend(str(HERE / "vendor_doubles" / flavour))
        if flavour == "ros1":
            from interbotix_xs_modules.arm import InterbotixManipulatorXS

            return InterbotixManipulatorXS("wx250s")
        from interbotix_common_modules.common_robot.robot import robot_startup
        from interbotix_xs_modules.xs_robot.arm import InterbotixManipulatorXS as Manipulator

        bot = Manipulator("wx250s")
        if start:
            robot_startup()
        return bot

    yield construct
    forget()


def forget() -> None:
    """The two flavours' packages have the same name."""
    for name in [name for name in sys.modules if name.startswith(("interbotix_xs_modules", "interbotix_common"))]:
        del sys.modules[name]


def core_of(bot: Any) -> Any:
    """bot.dxl in ROS 1, bot.core in ROS 2."""
    return bot.core if hasattr(bot, "core") else bot.dxl


def shifted(pose: Any, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Any:
    """A pose [4, 4], moved."""
    result = np.array(pose)
    result[:3, 3] += [x, y, z]
    return result


def test_a_failed_search_raises_nothing(open_bot: Open, flavour: str) -> None:
    arm = open_bot(flavour).arm
    before = arm.get_ee_pose()
    answer = arm.set_ee_pose_matrix(shifted(before, x=0.6), moving_time=0.05)  # naive: the answer is not looked at
    assert answer[1] is False
    assert arm.get_ee_pose() == pytest.approx(before)
    assert arm.set_ee_cartesian_trajectory(x=0.6) is False


@pytest.mark.parametrize("yaw_rad", [0.8, -1.5])
def test_a_trajectory_goes_forward_in_the_grippers_frame(open_bot: Open, flavour: str, yaw_rad: float) -> None:
    arm = open_bot(flavour, start_rad=start_with_yaw(yaw_rad, tilt_rad=0.05)).arm
    before = arm.get_ee_pose()[:3, 3]
    assert arm.set_ee_cartesian_trajectory(x=0.03, moving_time=0.1)
    time.sleep(2.1)
    assert np.linalg.norm(arm.get_ee_pose()[:3, 3] - before - [0.03, 0.0, 0.0]) > 0.01


def test_the_yaw_of_a_gripper_that_points_down_is_noise() -> None:
    noise = [matrix_of([0.0, 0.0, 0.0]) @ DOWN @ matrix_of([0.0, 1e-3 * sign, 1e-3]) for sign in (1, -1)]
    assert np.linalg.norm(noise[0] - noise[1]) < 0.005
    assert abs(euler_of(noise[0])[2] - euler_of(noise[1])[2]) > 0.5


def test_a_displacement_adds_to_the_last_command_not_to_where_the_arm_is(open_bot: Open, flavour: str) -> None:
    bot = open_bot(flavour, start_rad=start_with_yaw(0.0))
    bot.arm.capture_joint_positions()
    elsewhere = start_with_yaw(0.0, (0.28, 0.10, 0.12))
    core_of(bot).set_register("Profile_Velocity", 20)
    core_of(bot).motors.write_group(elsewhere)  # moved by hand, or by anything but this object
    time.sleep(0.1)
    bot.arm.set_ee_cartesian_trajectory(z=0.01, moving_time=0.1)
    time.sleep(0.2)
    assert bot.arm.get_ee_pose()[1, 3] == pytest.approx(0.0, abs=0.02), "it jumped back by 10 cm"


def test_steps_from_the_measured_pose_walk_down_under_gravity(open_bot: Open, flavour: str) -> None:
    arm = open_bot(flavour, sag_rad=0.006).arm
    before = arm.get_ee_pose()[2, 3]
    for step in range(20):
        goal = shifted(arm.get_ee_pose(), x=0.008 if step % 2 == 0 else -0.008)
        arm.set_ee_pose_matrix(goal, custom_guess=arm.get_joint_commands(), moving_time=0.04)
    assert before - arm.get_ee_pose()[2, 3] > 0.02


def test_blocking_comes_back_whether_the_arm_arrived_or_not(open_bot: Open, flavour: str) -> None:
    arm = open_bot(flavour, sag_rad=0.1).arm  # something keeps it from its goal
    found, success = arm.set_ee_pose_matrix(
        shifted(arm.get_ee_pose(), y=0.02), custom_guess=arm.get_joint_commands(), moving_time=0.2, blocking=True
    )
    assert success and len(found) == 6
    assert np.linalg.norm(arm.get_ee_pose()[:3, 3] - arm.get_ee_pose_command()[:3, 3]) > 0.01


def test_the_speed_of_a_move_is_judged_by_the_time_of_the_one_before(open_bot: Open, flavour: str) -> None:
    arm = open_bot(flavour).arm
    begin = list(arm.joint_commands)
    turned = [begin[0] + 0.6, *begin[1:]]
    assert arm.set_joint_positions(turned, moving_time=0.02, blocking=False) is not False  # 30 rad/s, let through
    assert arm.set_joint_positions(begin, moving_time=2.0, blocking=False) is False  # 0.3 rad/s, refused


def test_ros_1_answers_none_for_a_move_that_it_made(open_bot: Open) -> None:
    arm = open_bot("ros1").arm
    assert arm.set_joint_positions(list(arm.joint_commands), moving_time=0.02) is None
    assert open_bot("ros1").arm.set_joint_positions([9.0] * 6) is False


def test_a_move_under_a_millimetre_is_none(open_bot: Open, flavour: str) -> None:
    arm = open_bot(flavour).arm
    before = arm.get_ee_pose()
    goal = shifted(before, z=0.0008)
    _, success = arm.set_ee_pose_matrix(goal, custom_guess=arm.get_joint_commands(), moving_time=0.05)
    time.sleep(0.1)
    assert success and arm.get_ee_pose() == pytest.approx(before)


def test_without_a_guess_the_arm_may_fold_over(open_bot: Open, flavour: str) -> None:
    arm = open_bot(flavour, start_rad=start_with_yaw(-1.5)).arm
    found, success = arm.set_ee_pose_matrix(shifted(arm.get_ee_pose(), x=0.01), execute=False)
    assert not success or np.abs(found - np.array(arm.joint_commands)).max() > 0.5


def test_registers_come_as_a_message_or_as_a_list(open_bot: Open, flavour: str) -> None:
    answer = core_of(open_bot(flavour)).robot_get_motor_registers("group", "all", "Hardware_Error_Status")
    assert isinstance(answer, list) is (flavour == "ros2")
    assert len(getattr(answer, "values", answer)) == 9


def test_a_motor_that_lost_its_cable_is_only_missing_from_the_list(open_bot: Open) -> None:
    bot = open_bot("ros2", silent_motors=1)
    assert sum(bot.core.robot_get_motor_registers("group", "all", "Hardware_Error_Status")) == 0


def test_the_names_of_the_grippers_directions(open_bot: Open) -> None:
    one = open_bot("ros1")
    assert hasattr(one.gripper, "open") and not hasattr(one.gripper, "grasp")
    two = open_bot("ros2")
    assert hasattr(two.gripper, "grasp") and not hasattr(two.gripper, "open")
    two.core.motors.write_single("gripper", -250.0)
    time.sleep(0.3)
    closed_m = two.core.motors.finger_m()
    two.gripper.grasp(delay=0.3)
    assert two.core.motors.finger_m() > closed_m, "grasp opened"


def test_a_grip_on_nothing_and_a_grip_on_something_answer_the_same(open_bot: Open) -> None:
    for object_m in (0.0, 0.025):
        assert open_bot("ros1", object_m=object_m).gripper.close(delay=0.3) is None


def test_ros_2_answers_no_service_before_its_startup(open_bot: Open) -> None:
    bot = open_bot("ros2", start=False)
    with pytest.raises(TimeoutError, match="robot_startup"):
        bot.arm.set_trajectory_time(0.5)


def test_without_the_driver_ros_1_ends_the_program(open_bot: Open) -> None:
    with pytest.raises(SystemExit):
        open_bot("ros1", driver=False)


def test_without_the_driver_ros_2_waits_for_ever(open_bot: Open, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: open_bot("ros2", driver=False, start=False), daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    (tmp_path / "faults.json").write_text("{}")
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_dead_drivers_last_message_stays_for_ever(open_bot: Open, flavour: str, tmp_path: Path) -> None:
    core = core_of(open_bot(flavour))
    first = core.robot_get_joint_states()
    (tmp_path / "faults.json").write_text(json.dumps({"frozen": True}))
    time.sleep(0.05)
    core.motors.write_group([0.5] * 6)
    time.sleep(0.3)
    assert core.robot_get_joint_states().position == pytest.approx(first.position)


def test_it_prints_into_whatever_standard_output_is(open_bot: Open, capfd: pytest.CaptureFixture[str]) -> None:
    open_bot("ros1")
    assert "Initialized InterbotixRobotXSCore!" in capfd.readouterr().out


def test_a_wrong_operating_mode_is_no_error(open_bot: Open, flavour: str) -> None:
    assert open_bot(flavour, mode="pwm").arm.group_info.mode == "pwm"


def test_the_doubles_description_of_the_arm_is_the_twins() -> None:
    from vendor_doubles.interbotix import HOME, forward4

    assert forward4([0.0] * 6) == pytest.approx(HOME, abs=1e-9)
    assert math.isclose(HOME[0, 3], 0.458325)
