"""ROS 2: ``interbotix_xs_modules/xs_robot/arm.py``. bot.core, release and grasp, startup needed."""

from __future__ import annotations

import time
from typing import Any

from interbotix_common_modules.common_robot import robot
from vendor_doubles.interbotix import ArmInterface, Core, GripperInterface


class Core2(Core):
    """``core.InterbotixRobotXSCore`` of ROS 2."""

    def __init__(self) -> None:
        super().__init__()
        self.constructed = False
        while not self.motors.faults.driver:
            # Trap (core.__init__, "while self.joint_states is None"): without the driver it waits for ever.
            time.sleep(0.05)

    def robot_get_motor_registers(self, cmd_type: str, name: str, reg: str) -> list[int]:
        """A plain list. Trap: before robot_startup nothing answers a service call."""
        if not robot.is_up():
            raise TimeoutError("no executor spins: robot_startup() was not called")
        return self.motors.registers(reg)

    def set_register(self, register: str, value: int) -> None:
        """Trap (common_robot.robot): before robot_startup, registers are set only while the arm is constructed."""
        if self.constructed and not robot.is_up():
            raise TimeoutError("no executor spins: robot_startup() was not called")
        super().set_register(register, value)


class Arm2(ArmInterface):
    """The arm of ROS 2."""

    def set_joint_positions(
        self,
        joint_positions: Any,
        moving_time: float | None = None,
        accel_time: float | None = None,
        blocking: bool = True,
    ) -> bool:
        """True when it moved."""
        if not self.check_joint_limits(joint_positions):
            return False
        self.publish_positions(joint_positions, moving_time, accel_time, blocking)
        return True


class Gripper2(GripperInterface):
    """The gripper of ROS 2, as of 2022.

    Trap (gripper.grasp and gripper.release in commit 0352db7): the names were swapped; ``grasp`` opened.
    """

    def grasp(self, delay: float = 1.0) -> None:
        """Positive effort, which opens."""
        self.gripper_controller(self.gripper_value, delay)

    def release(self, delay: float = 1.0) -> None:
        """Negative effort, which closes."""
        self.gripper_controller(-self.gripper_value, delay)


class InterbotixManipulatorXS:
    """The class that programs construct."""

    def __init__(
        self,
        robot_model: str,
        group_name: str = "arm",
        gripper_name: str = "gripper",
        robot_name: str | None = None,
        moving_time: float = 2.0,
        accel_time: float = 0.3,
    ) -> None:
        self.core = Core2()
        self.arm = Arm2(self.core, moving_time, accel_time)
        self.gripper = Gripper2(self.core)
        self.core.constructed = True
