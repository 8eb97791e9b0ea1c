"""What both flavours of interbotix_xs_modules share, with their traps. Imitated behaviour, our own code.

Sources, in Interbotix/interbotix_ros_toolboxes: ROS 1 ``interbotix_xs_toolbox/interbotix_xs_modules/src/
interbotix_xs_modules/{arm,core,gripper}.py``; ROS 2 ``.../interbotix_xs_modules/xs_robot/{arm,core,gripper}.py`` and
``interbotix_common_modules/common_robot/robot.py``. Each trap names the function that it imitates.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vendor_doubles.simulated_motors import ARM_NAMES, NAMES, JointState, Motors
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]
Pose4 = FloatArray

SLIST = np.array(
    [
        [0, 0, 1, 0, 0, 0],
        [0, 1, 0, -0.11065, 0, 0],
        [0, 1, 0, -0.36065, 0, 0.04975],
        [1, 0, 0, 0, 0.36065, 0],
        [0, 1, 0, -0.36065, 0, 0.29975],
        [1, 0, 0, 0, 0.36065, 0],
    ],
    dtype=np.float64,
).T
HOME = np.array([[1, 0, 0, 0.458325], [0, 1, 0, 0], [0, 0, 1, 0.36065], [0, 0, 0, 1]], dtype=np.float64)


def forward4(joints: Any) -> Pose4:
    """FKinSpace of the wx250s."""
    pose, result = kinematics.forward(joints), np.eye(4)
    result[:3, :3], result[:3, 3] = pose.rotation, pose.position_m
    return result


def euler_of(rotation: FloatArray) -> list[float]:
    """``angle_manipulation.rotationMatrixToEulerAngles``: near the singularity roll and yaw are whatever comes out."""
    sy = math.hypot(rotation[0, 0], rotation[1, 0])
    if sy < 1e-6:
        return [math.atan2(-rotation[1, 2], rotation[1, 1]), math.atan2(-rotation[2, 0], sy), 0.0]
    return [
        math.atan2(rotation[2, 1], rotation[2, 2]),
        math.atan2(-rotation[2, 0], sy),
        math.atan2(rotation[1, 0], rotation[0, 0]),
    ]


def matrix_of(euler: list[float]) -> FloatArray:
    """``angle_manipulation.eulerAnglesToRotationMatrix``."""
    (a, b, c) = euler
    x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    z = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return np.asarray(z @ y @ x)


def ik_in_space(goal: Pose4, guess: list[float]) -> tuple[FloatArray, bool]:
    """``modern_robotics.IKinSpace`` with the 0.001 and 0.001 that ``arm.set_ee_pose_matrix`` passes.

    Trap: a guess within 1 mm and 1 mrad of the goal is given back as the solution, so a small move is no move.
    Trap: it knows no joint limits.
    """
    joints = np.array(guess, dtype=np.float64)
    for _ in range(21):
        pose = kinematics.forward(joints)
        turn = goal[:3, :3] @ pose.rotation.T
        sine = 0.5 * np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
        norm = float(np.linalg.norm(sine))
        angle = math.atan2(norm, 0.5 * (float(np.trace(turn)) - 1.0))
        vector = sine * (angle / norm) if norm > 1e-9 else sine
        shift = goal[:3, 3] - pose.position_m
        if float(np.linalg.norm(vector)) <= 0.001 and float(np.linalg.norm(shift)) <= 0.001:
            return joints, True
        joints = joints + np.linalg.pinv(kinematics.jacobian(joints)) @ np.concatenate([shift, vector])
    return joints, False


@dataclass
class GroupInfo:
    """RobotInfo's answer for the group ``arm``."""

    mode: str
    profile_type: str = "time"
    num_joints: int = 6
    joint_names: list[str] = field(default_factory=lambda: list(ARM_NAMES))
    joint_lower_limits: list[float] = field(default_factory=lambda: [float(v) for v in kinematics.JOINT_LOWER_RAD])
    joint_upper_limits: list[float] = field(default_factory=lambda: [float(v) for v in kinematics.JOINT_UPPER_RAD])
    joint_velocity_limits: list[float] = field(default_factory=lambda: [math.pi] * 6)


class Core:
    """``core.InterbotixRobotXSCore``: what both flavours offer."""

    def __init__(self) -> None:
        self.motors = Motors()
        self.js_index_map = {name: index for index, name in enumerate(NAMES)}
        # Trap (core.__init__): it prints to standard output, which may be somebody's pipe.
        print("Robot Name: wx250s\nRobot Model: wx250s\nInitialized InterbotixRobotXSCore!\n", flush=True)

    @property
    def joint_states(self) -> JointState:
        """Trap (core.joint_state_cb): the last message for ever, however old."""
        return self.motors.joint_states()

    def robot_get_joint_states(self) -> JointState:
        """A copy of the last message."""
        return copy.deepcopy(self.joint_states)

    def robot_write_commands(self, group_name: str, commands: list[float]) -> None:
        """Publishes, checks nothing, does not touch the arm object's last command."""
        assert group_name == "arm", group_name
        self.motors.write_group(commands)

    def robot_write_joint_command(self, joint_name: str, command: float) -> None:
        """Publishes, checks nothing."""
        self.motors.write_single(joint_name, command)

    def robot_torque_enable(self, cmd_type: str, name: str, enable: bool) -> None:
        """Remembered, so that a test can say it never happened."""
        self.motors.log("torque", enable=enable)

    def robot_reboot_motors(self, cmd_type: str, name: str, enable: bool, smart_reboot: bool = False) -> None:
        """Remembered too."""
        self.motors.log("reboot", enable=enable)

    def set_register(self, register: str, value: int) -> None:
        """The service call behind ``set_trajectory_time``: slow, and only when something changed."""
        time.sleep(0.002)
        if register == "Profile_Velocity":
            self.motors.profile_s = value / 1000.0


class ArmInterface:
    """``arm.InterbotixArmXSInterface``."""

    def __init__(self, core: Core, moving_time: float, accel_time: float) -> None:
        self.core = core
        self.robot_des = SimpleNamespace(Slist=SLIST, M=HOME)
        # Trap (arm.__init__): a wrong mode is only logged.
        self.group_info = GroupInfo(mode=core.motors.faults.mode)
        self.initial_guesses = [[0.0] * 6, [math.radians(-120), *[0.0] * 5], [math.radians(120), *[0.0] * 5]]
        self.moving_time = self.accel_time = 0.0
        self.joint_commands = [float(v) for v in core.joint_states.position[:6]]
        self.T_sb = forward4(self.joint_commands)
        self.set_trajectory_time(moving_time, accel_time)

    def set_trajectory_time(self, moving_time: float | None = None, accel_time: float | None = None) -> None:
        """Trap (arm.set_trajectory_time): it stays for every later move."""
        if moving_time is not None and moving_time != self.moving_time:
            self.moving_time = moving_time
            self.core.set_register("Profile_Velocity", int(moving_time * 1000))
        if accel_time is not None and accel_time != self.accel_time:
            self.accel_time = accel_time
            self.core.set_register("Profile_Acceleration", int(accel_time * 1000))

    def check_joint_limits(self, positions: Any) -> bool:
        """Trap (arm.check_joint_limits, issue 89): the speed is judged with the time of the move before this one,
        and from the last command instead of the encoders."""
        theta = [int(v * 1000) / 1000.0 for v in positions]
        info = self.group_info
        for index, (goal, current) in enumerate(zip(theta, self.joint_commands, strict=True)):
            if not info.joint_lower_limits[index] <= goal <= info.joint_upper_limits[index]:
                return False
            if abs(goal - current) / self.moving_time > info.joint_velocity_limits[index]:
                return False
        return True

    def publish_positions(
        self, positions: Any, moving_time: float | None = None, accel_time: float | None = None, blocking: bool = True
    ) -> None:
        """Trap (arm.publish_positions): blocking sleeps; it does not look whether the arm came there."""
        self.set_trajectory_time(moving_time, accel_time)
        self.joint_commands = [float(v) for v in positions]
        self.core.motors.write_group(self.joint_commands)
        if blocking:
            time.sleep(self.moving_time)
        self.T_sb = forward4(self.joint_commands)

    def set_ee_pose_matrix(
        self,
        T_sd: Pose4,
        custom_guess: list[float] | None = None,
        execute: bool = True,
        moving_time: float | None = None,
        accel_time: float | None = None,
        blocking: bool = True,
    ) -> tuple[Any, bool]:
        """Trap (arm.set_ee_pose_matrix): a failure is (joints, False), and nothing is raised.
        Trap: without a guess it starts from the zero pose and may come back with another arm configuration."""
        found = np.zeros(6)
        for guess in self.initial_guesses if custom_guess is None else [custom_guess]:
            found, success = ik_in_space(T_sd, guess)
            if success and self.check_joint_limits(found):
                if execute:
                    self.publish_positions(found, moving_time, accel_time, blocking)
                    self.T_sb = T_sd
                return found, True
        return found, False

    def set_ee_pose_components(
        self, x: float, y: float, z: float, roll: float = 0, pitch: float = 0, yaw: float = 0, **more: Any
    ) -> tuple[Any, bool]:
        """A pose from Euler angles (arm.set_ee_pose_components)."""
        goal = np.eye(4)
        goal[:3, :3], goal[:3, 3] = matrix_of([roll, pitch, yaw]), [x, y, z]
        return self.set_ee_pose_matrix(goal, **more)

    def set_ee_cartesian_trajectory(
        self, x: float = 0, y: float = 0, z: float = 0, moving_time: float = 0.4, wp_period: float = 0.05
    ) -> bool:
        """Trap (arm.set_ee_cartesian_trajectory): x and y lie in a frame turned by the end effector's yaw; with the
        gripper down that yaw is noise. Trap: the displacement adds to the last command, not to where the arm is.
        Trap: a failure is False."""
        yaw = euler_of(self.T_sb[:3, :3])[2]
        turned = np.eye(4)
        turned[:3, :3] = matrix_of([0.0, 0.0, yaw])
        inner = np.linalg.inv(turned) @ self.T_sb
        joints: Any = list(self.joint_commands)
        steps = max(int(moving_time / wp_period), 1)
        for _ in range(steps):
            inner[:3, 3] += np.array([x, y, z]) / steps
            joints, success = self.set_ee_pose_matrix(turned @ inner, list(joints), execute=False)
            if not success:
                return False
        self.core.motors.write_group([float(v) for v in joints])
        time.sleep(moving_time)
        self.T_sb, self.joint_commands = turned @ inner, [float(v) for v in joints]
        return True

    def get_joint_commands(self) -> list[float]:
        """What was commanded last (arm.get_joint_commands)."""
        return list(self.joint_commands)

    def get_ee_pose_command(self) -> Pose4:
        """Trap (arm.get_ee_pose_command): what was commanded, not what was reached."""
        return np.array(self.T_sb)

    def get_ee_pose(self) -> Pose4:
        """From the encoders."""
        return forward4(self.core.joint_states.position[:6])

    def capture_joint_positions(self) -> None:
        """The remedy: the last command becomes what the encoders say."""
        self.joint_commands = [float(v) for v in self.core.joint_states.position[:6]]
        self.T_sb = forward4(self.joint_commands)


class GripperInterface:
    """``gripper.InterbotixGripperXSInterface``; the two flavours name its two directions differently."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.gripper_value = 250.0
        self.left_finger_lower_limit = kinematics.FINGER_MIN_M
        self.left_finger_upper_limit = kinematics.FINGER_MAX_M

    def gripper_controller(self, effort: float, delay: float) -> None:
        """Trap (gripper.gripper_controller): sleeps, reports nothing; whether it holds something nobody says."""
        finger_m = self.core.motors.finger_m()
        opening = effort > 0 and finger_m < self.left_finger_upper_limit
        closing = effort < 0 and finger_m > self.left_finger_lower_limit
        if opening or closing:
            self.core.motors.write_single("gripper", effort)
            time.sleep(delay)
