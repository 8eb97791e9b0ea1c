"""ROS 1: ``interbotix_xs_modules/src/interbotix_xs_modules/arm.py``. bot.dxl, open and close, no startup."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from vendor_doubles.interbotix import ArmInterface, Core, GripperInterface


class Core1(Core):
    """``core.InterbotixRobotXSCore`` of ROS 1."""

    def __init__(self) -> None:
        super().__init__()
        if not self.motors.faults.driver:
            # Trap (core.__init__): without the driver's services the process ends.
            print("Failed to find services under namespace 'wx250s'. Shutting down...", flush=True)
            sys.exit(1)

    def robot_get_motor_registers(self, cmd_type: str, name: str, reg: str) -> SimpleNamespace:
        """Trap (core.robot_get_motor_registers): a message with ``values``; ROS 2 gives the list."""
        return SimpleNamespace(values=self.motors.registers(reg))


class Arm1(ArmInterface):
    """The arm of ROS 1."""

    def set_joint_positions(
        self,
        joint_positions: Any,
        moving_time: float | None = None,
        accel_time: float | None = None,
        blocking: bool = True,
    ) -> bool | None:
        """Trap (arm.set_joint_positions): None when it moved, False when not: ``if not ...`` is always true."""
        if not self.check_joint_limits(joint_positions):
            return False
        self.publish_positions(joint_positions, moving_time, accel_time, blocking)
        return None


class Gripper1(GripperInterface):
    """The gripper of ROS 1."""

    def open(self, delay: float = 1.0) -> None:
        """Positive effort."""
        self.gripper_controller(self.gripper_value, delay)

    def close(self, delay: float = 1.0) -> None:
        """Negative effort."""
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
        init_node: bool = True,
    ) -> None:
        self.dxl = Core1()
        self.arm = Arm1(self.dxl, moving_time, accel_time)
        self.gripper = Gripper1(self.dxl)
