"""What ``doctor`` finds on the machine itself: camera libraries, ROS and Interbotix's packages, disk."""

from __future__ import annotations

import ctypes.util
import glob
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.robots.dynamixel import DynamixelSettings, Motor, joint_of, read_motors

ROS_PYTHON = "/usr/bin/python3"
ROS_TIMEOUT_S = 30.0
MIN_FREE_BYTES = 2 << 30
ARM_PORT = Path("/dev/ttyDXL")
INTEL_USB = "8086"
UDEV_RULES = ("/etc/udev/rules.d/*realsense*", "/lib/udev/rules.d/*realsense*", "/usr/lib/udev/rules.d/*realsense*")


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is good, what was found, and the line that mends it."""

    what: str
    good: bool
    found: str
    remedy: str = ""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def camera_findings(camera: str, usb: Path = Path("/sys/bus/usb/devices")) -> list[Finding]:
    """The libraries and the device of a camera, by its name; nothing is opened."""
    if camera == "twin":
        return [_simulator()]
    if camera in ("video", "v4l2"):
        there = _installed("cv2")
        word = "installed" if there else "not installed"
        opencv = Finding("OpenCV", there, word, "pip install 'vlm2vla-client[video]'")
        return [opencv] if camera == "video" else [opencv, _usb_camera()]
    if camera != "realsense":  # images: a folder of pictures needs nothing
        return []
    library, usb_library = _installed("pyrealsense2"), ctypes.util.find_library("usb-1.0") is not None
    rules = [path for pattern in UDEV_RULES for path in glob.glob(pattern)]
    devices = realsense_devices(usb)
    return [
        Finding("pyrealsense2", library, "installed" if library else "not installed",
                "pip install 'vlm2vla-client[realsense]'"),
        Finding("libusb", usb_library, "found" if usb_library else "no libusb-1.0",
                "sudo apt-get install libusb-1.0-0"),
        Finding("udev rules", bool(rules), rules[0] if rules else "none for RealSense cameras",
                "copy librealsense's config/99-realsense-libusb.rules into /etc/udev/rules.d, then: "
                "sudo udevadm control --reload && sudo udevadm trigger"),
        Finding("RealSense on USB", bool(devices), ", ".join(devices) or "no camera",
                "plug it into a USB 3 port (blue), with the cable that came with it"),
    ]  # fmt: skip


def realsense_devices(usb: Path) -> list[str]:
    """The names of the RealSense cameras that the kernel sees."""
    names = []
    for device in sorted(usb.glob("*")):
        try:
            vendor = (device / "idVendor").read_text(encoding="utf-8").strip()
            product = (device / "product").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if vendor == INTEL_USB and "RealSense" in product:
            names.append(product)
    return names


def _usb_camera(folder: Path = Path("/dev")) -> Finding:
    devices = sorted(str(path) for path in folder.glob("video*"))
    return Finding("USB camera", bool(devices), ", ".join(devices) or f"no {folder}/video*", "plug it in")


def _simulator() -> Finding:
    there = _installed("mujoco")
    return Finding("simulator", there, "installed" if there else "no mujoco", "pip install 'vlm2vla-client[sim]'")


def robot_findings(robot: str, table: Mapping[str, Any]) -> list[Finding]:
    """What an arm needs on this machine, by its name; nothing is opened and nothing moves.

    Args:
        table: the arm's own in client.toml; of ``[widowx]``, ``python`` and ``setup`` are used.
    """
    if robot == "widowx":
        setups = [str(path) for path in table.get("setup", ())] or ros_setups()
        return [*_ros(setups, str(table.get("python", ROS_PYTHON))), _arm_port()]
    if robot == "bridge":
        there = _installed("widowx_envs")
        remedy = "install the folder widowx_envs of bridge_data_robot, and edgeml from its author's repository"
        return [Finding("widowx_envs", there, "installed" if there else "not installed", remedy)]
    if robot == "dynamixel":
        return motor_findings(table)
    return [_simulator()] if robot == "twin" else []


def motor_findings(table: Mapping[str, Any]) -> list[Finding]:
    """Each motor of the arm, read over its USB adapter without ROS; nothing is written to one."""
    found: list[Finding] = []
    try:
        for number, said in read_motors(DynamixelSettings.from_table(table)):
            found.append(_motor(number, said))
    except ConfigurationError as error:
        remedy = "pip install 'vlm2vla-client[dynamixel]'" if "pip install" in str(error) else "correct client.toml"
        return [Finding("motors", False, str(error), remedy)]
    except RobotError as error:
        remedy = "plug in the U2D2, end the arm's driver, or: sudo usermod -aG dialout $USER, then log in again"
        found.append(Finding("motors", False, str(error), remedy))
    return found


def _motor(number: int, said: Motor | str) -> Finding:
    what = f"motor {number} {joint_of(number)}"
    if isinstance(said, str):
        remedy = "is the arm's power on? the daisy chain's cable before this motor, and baud_rate of [dynamixel]"
        return Finding(what, False, said, remedy)
    if said.problem is None:
        return Finding(what, True, str(said))
    remedy = "support the arm; find the cause; let it cool, or switch its power off and on"
    return Finding(what, False, f"{said.problem} ({said})", remedy)


def ros_setups() -> list[str]:
    """The setup scripts that are there, ROS's own first, then the workspace of Interbotix's packages."""
    workspace = Path.home() / "interbotix_ws"
    places = ("/opt/ros/*/setup.bash", f"{workspace}/install/setup.bash", f"{workspace}/devel/setup.bash")
    return [path for place in places for path in sorted(glob.glob(place))]


def _ros(setups: list[str], python: str) -> list[Finding]:
    ros = [path for path in setups if Path(path).is_file()]
    install = "follow Interbotix's X-Series installation for this Ubuntu (ROS 1 Noetic, ROS 2 Humble or Jazzy)"
    absent = f"no {', '.join(setups) or '/opt/ros/*/setup.bash'}"
    found = Finding("ROS", bool(ros), ", ".join(ros) or absent, install)
    if not ros:
        return [found, Finding("interbotix", False, "not looked for without ROS", install)]
    problem = interbotix_problem(ros, python)
    word = "interbotix_xs_modules can be imported" if problem is None else problem
    return [found, Finding("interbotix", problem is None, word, f"{install}; it makes ~/interbotix_ws")]


def interbotix_problem(setups: list[str], python: str = ROS_PYTHON) -> str | None:
    """Why ROS's own Python cannot import the arm's package; None when it can."""
    sources = "; ".join(f"source {shlex.quote(path)}" for path in setups)
    # Without the client's own Python settings, which would hide ROS's packages.
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = f"{sources}; {shlex.quote(python)} -c 'import interbotix_xs_modules'"
    try:
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True,
                              timeout=ROS_TIMEOUT_S, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} gave no answer ({type(error).__name__})"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["interbotix_xs_modules cannot be imported"])[-1]


def _arm_port() -> Finding:
    if not ARM_PORT.exists():
        remedy = "plug in the U2D2 and switch the arm's power on; the udev rule comes with Interbotix's packages"
        return Finding("arm's USB adapter", False, f"no {ARM_PORT}", remedy)
    usable = os.access(ARM_PORT, os.R_OK | os.W_OK)
    word = str(ARM_PORT) if usable else f"{ARM_PORT} may not be opened by this user"
    return Finding("arm's USB adapter", usable, word, "sudo usermod -aG dialout $USER, then log in again")


def disk_findings(record: Path) -> list[Finding]:
    """Room for recordings, and the right to write them."""
    folder = record.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK | os.X_OK)
    good = writable and free >= MIN_FREE_BYTES
    found = f"{free / 2**30:.1f} GiB free in {folder}" if writable else f"{folder} cannot be written"
    return [Finding("disk", good, found, f"free {MIN_FREE_BYTES >> 30} GiB, or give --record DIR")]
