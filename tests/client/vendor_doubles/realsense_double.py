"""A double of the part of pyrealsense2 that the client uses, with the traps of the real one.

Each trap names the line of librealsense (github.com/IntelRealSense/librealsense, commit cacc8e701a96) that it imitates:

- a frame's memory is used again for a later frame (src/frame-archive.h:37-45, freelist);
- frames that are kept stop the stream: 16 at most are out at a time (src/frame-archive.h:121-129);
- starting without the device waits for it and then raises (src/pipeline/pipeline.cpp:84-100, src/device_hub.cpp:117);
- stopping after the device is gone raises (src/pipeline/pipeline.cpp:181);
- an unplugged device makes no noise: waiting times out (src/pipeline/pipeline.cpp:322-343);
- a set of frames without colour gives an empty colour frame, not an error (wrappers/python/pyrs_frame.cpp:135);
- automatic exposure starts dark and settles within a second; while it is on, the option reads what was last set by
  hand, and a value written is overwritten; a device that was replugged has all options at their defaults (UVC).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

MOST_FRAMES_OUT = 16
SETTLED_AFTER = 30
CHOSEN = {"exposure": 187.0, "gain": 48.0, "white_balance": 4250.0}
BY_HAND = {"exposure": 156.0, "gain": 64.0, "white_balance": 4600.0}
_AUTOMATIC = {
    "exposure": "enable_auto_exposure",
    "gain": "enable_auto_exposure",
    "white_balance": "enable_auto_white_balance",
}
_ACTUAL = {"actual_exposure": "exposure", "gain_level": "gain", "white_balance": "white_balance"}


def default_options() -> dict[str, float]:
    return {**BY_HAND, "enable_auto_exposure": 1.0, "enable_auto_white_balance": 1.0, "auto_exposure_priority": 1.0}


@dataclass(eq=False)
class DeviceDouble:
    """One camera on the bus; a test plugs, stalls and delays it from its own thread."""

    serial: str
    fps: int = 30
    plugged: bool = True
    stalled: bool = False
    frozen: bool = False  # the same picture, with the same number, again and again
    without_colour: bool = False
    late_s: float = 0.0
    options: dict[str, float] = field(default_factory=default_options)
    starts: int = 0
    taken: int = 0
    session: int = 0

    def unplug(self) -> None:
        self.plugged = False
        self.session += 1
        self.options = default_options()

    def plug_in(self) -> None:
        self.plugged = True

    def supports(self, key: str) -> bool:
        return key in self.options or key == "serial_number"

    def get_info(self, key: str) -> str:
        assert key == "serial_number"
        return self.serial

    def first_color_sensor(self) -> DeviceDouble:
        return self

    def set_option(self, name: str, value: float) -> None:
        if not self.plugged:
            raise RuntimeError("set_xu(...) failed: no such device")
        if self.options.get(_AUTOMATIC.get(name, ""), 0.0):
            return
        self.options[name] = value

    def get_option(self, name: str) -> float:
        return self.options[name]

    def in_force(self, name: str) -> float:
        return CHOSEN[name] if self.options[_AUTOMATIC[name]] else self.options[name]


class HandleDouble:
    """A device as one pipeline knows it: replugged, it is another one."""

    def __init__(self, device: DeviceDouble) -> None:
        self._device, self._session = device, device.session

    def is_connected(self) -> bool:
        return self._device.plugged and self._device.session == self._session

    def first_color_sensor(self) -> DeviceDouble:
        return self._device


class FrameDouble:
    """A colour frame, also the set that holds it; ``memory`` belongs to the SDK."""

    def __init__(self, memory: NDArray[np.uint8], number: int, stamp_ms: float, device: DeviceDouble) -> None:
        self._memory, self._number, self._stamp_ms, self._device = memory, number, stamp_ms, device

    def is_frameset(self) -> bool:
        return True

    def as_frameset(self) -> FrameDouble:
        return self

    def get_color_frame(self) -> FrameDouble | None:
        return None if self._device.without_colour else self

    def get_profile(self) -> FrameDouble:
        return self

    def format(self) -> str:
        return "rgb8"

    def get_data(self) -> NDArray[np.uint8]:
        return self._memory

    def get_frame_number(self) -> int:
        return self._number

    def get_timestamp(self) -> float:
        return self._stamp_ms

    def supports_frame_metadata(self, key: str) -> bool:
        return key in _ACTUAL

    def get_frame_metadata(self, key: str) -> int:
        return int(self._device.in_force(_ACTUAL[key]))


class QueueDouble:
    """What a pipeline fills; frames come by the wall clock, and only the newest can be had."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.handle: HandleDouble | None = None
        self.device: DeviceDouble | None = None
        self._out: weakref.WeakSet[FrameDouble] = weakref.WeakSet()
        self._memory = np.zeros((48, 64, 3), dtype=np.uint8)
        self._number = 0
        self._started_s = 0.0
        self._stamp_s = float("-inf")

    def fill_from(self, device: DeviceDouble, handle: HandleDouble) -> None:
        self.device, self.handle, self._number = device, handle, 0
        self._started_s, self._stamp_s = time.monotonic(), float("-inf")

    def try_wait_for_frame(self, timeout_ms: int) -> tuple[bool, FrameDouble | None]:
        deadline_s = time.monotonic() + timeout_ms / 1000.0
        while (now_s := time.monotonic()) < deadline_s:
            frame = self._newest(now_s)
            if frame is not None:
                return True, frame
            time.sleep(0.002)
        return False, None

    def _newest(self, now_s: float) -> FrameDouble | None:
        device, handle = self.device, self.handle
        if device is None or handle is None or not handle.is_connected() or device.stalled:
            return None
        if len(self._out) >= MOST_FRAMES_OUT:
            return None
        number = int((now_s - self._started_s) * device.fps)
        # The device's clock began at another time; a picture that comes late was taken before, in the same order.
        stamp_s = now_s - 1000.0 - device.late_s
        if device.frozen and self._number:
            number = self._number
        elif number <= self._number or stamp_s <= self._stamp_s:
            return None
        self._stamp_s = stamp_s
        self._number = number
        device.taken += 1
        self._memory[...] = 5 * min(number, SETTLED_AFTER)
        self._memory[0, 0] = (number // 256, number % 256, 0)
        frame = FrameDouble(self._memory, number, 1000.0 * stamp_s, device)
        self._out.add(frame)
        return frame


class ConfigDouble:
    def __init__(self) -> None:
        self.serial: str | None = None

    def enable_device(self, serial: str) -> None:
        self.serial = serial

    def enable_stream(self, stream: str, width: int, height: int, form: str, fps: int) -> None:
        assert (stream, form) == ("color", "rgb8") and width > 0 and height > 0 and fps > 0


class ProfileDouble:
    def __init__(self, handle: HandleDouble) -> None:
        self._handle = handle

    def get_device(self) -> HandleDouble:
        return self._handle


class PipelineDouble:
    def __init__(self, context: ContextDouble) -> None:
        self._devices = context.devices
        self._handle: HandleDouble | None = None

    def start(self, config: ConfigDouble, queue: QueueDouble) -> ProfileDouble:
        if self._handle is not None:
            raise RuntimeError("start() cannot be called before stop()")
        deadline_s = time.monotonic() + 5.0
        while time.monotonic() < deadline_s:
            for device in self._devices:
                if device.plugged and device.serial == config.serial:
                    device.starts += 1
                    self._handle = HandleDouble(device)
                    queue.fill_from(device, self._handle)
                    return ProfileDouble(self._handle)
            time.sleep(0.05)
        raise RuntimeError("No device connected")

    def stop(self) -> None:
        if self._handle is None:
            raise RuntimeError("stop() cannot be called before start()")
        connected, self._handle = self._handle.is_connected(), None
        if not connected:
            raise RuntimeError("hwmon command failed: no such device")


class ContextDouble:
    def __init__(self, devices: list[DeviceDouble]) -> None:
        self.devices = devices

    def query_devices(self) -> Iterator[DeviceDouble]:
        return iter([device for device in self.devices if device.plugged])


class RealSenseDouble:
    """Stands in for the module."""

    stream = SimpleNamespace(color="color")
    format = SimpleNamespace(rgb8="rgb8", bgr8="bgr8")
    camera_info = SimpleNamespace(serial_number="serial_number")
    option = SimpleNamespace(**{name: name for name in default_options()})
    frame_metadata_value = SimpleNamespace(**{name: name for name in _ACTUAL})

    def __init__(self, *devices: DeviceDouble) -> None:
        self.devices = list(devices)
        self.config = ConfigDouble
        self.pipeline = PipelineDouble
        self.frame_queue = QueueDouble

    def context(self) -> ContextDouble:
        return ContextDouble(self.devices)
