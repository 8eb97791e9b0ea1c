"""ROS 2: ``interbotix_common_modules/common_robot/robot.py``: nothing is answered before ``robot_startup``."""

from __future__ import annotations

_UP = [False]


def robot_startup() -> None:
    """Starts the thread that spins the node; twice is an error, as in the vendor's ``__start``."""
    if _UP[0]:
        raise RuntimeError("Startup has already been requested")
    _UP[0] = True


def robot_shutdown() -> None:
    """Ends it."""
    _UP[0] = False


def is_up() -> bool:
    """``interbotix_is_up``."""
    return _UP[0]
