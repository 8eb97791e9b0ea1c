"""A USB camera by Video4Linux, through OpenCV."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2vla_client.cameras.capture import (
    LATENCY_FRAMES,
    WARMUP_FRAMES,
    CaptureCamera,
    CaptureTimes,
    Picture,
)
from vlm2vla_client.cameras.opencv import load_opencv, rgb
from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import CameraError, ConfigurationError

DEFAULT_DEVICE = Path("/dev/video0")


class V4l2Source:
    """One /dev/videoN. Arguments: see :class:`V4l2Camera`.

    OpenCV waits up to 10 s for a picture and takes no deadline: a camera that stalls is reopened only after that.
    Whoever asks for a frame is refused in time all the same.
    """

    def __init__(self, cv2: Any, clock: Clock, device: Path, size: tuple[int, int], fps: int, warmup: int) -> None:
        self._cv2, self._clock, self._device, self._size, self._fps = cv2, clock, device, size, fps
        self._warmup = warmup
        self._capture: Any = None
        self._times = CaptureTimes(0.0)
        self._number = -1

    @property
    def name(self) -> str:
        """The device file."""
        return str(self._device)

    def open(self) -> None:
        """Opens the device and drops the pictures of an exposure that has not settled. Blocks for about two seconds."""
        # By number: OpenCV's V4L2 takes no names, and a link of /dev/v4l/by-id points to another number after a replug.
        found = re.fullmatch(r"video(\d+)", self._device.resolve().name)
        if found is None or not self._device.exists():
            raise CameraError("no such camera is plugged in: see /dev/video* and /dev/v4l/by-id")
        capture = self._cv2.VideoCapture(int(found.group(1)), self._cv2.CAP_V4L2)
        self._capture = capture
        if not capture.isOpened():
            raise CameraError("it cannot be opened: is another program using it, are you in the group video?")
        capture.set(self._cv2.CAP_PROP_FRAME_WIDTH, self._size[0])
        capture.set(self._cv2.CAP_PROP_FRAME_HEIGHT, self._size[1])
        capture.set(self._cv2.CAP_PROP_FPS, self._fps)
        capture.set(self._cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest only: queued pictures would be old ones
        self._times, self._number = CaptureTimes(LATENCY_FRAMES / self._fps), -1
        for _ in range(self._warmup):
            self.read(0.0)

    def read(self, timeout_s: float) -> Picture | None:
        """The newest picture; blocks for a frame period, or for up to 10 s when the camera stalls."""
        came, image = self._capture.read()
        if not came:
            raise CameraError("it gives no pictures: it was unplugged or has stalled")
        arrival_s = self._clock.now_s()
        device_s = float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000.0
        if device_s > 0.0:
            captured_s = self._times.captured_s(device_s, arrival_s)
        else:  # a driver without time stamps
            captured_s = arrival_s - LATENCY_FRAMES / self._fps
        self._number += 1
        return Picture(rgb(image), captured_s, self._number)

    def close(self) -> None:
        """Releases the device."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.release()


class V4l2Camera(CaptureCamera):
    """A USB camera.

    Args:
        device: /dev/videoN, or better a link of /dev/v4l/by-id, which stays the same camera.
        size: width and height asked for, pixels; a camera that lacks them gives its nearest.
        fps: pictures a second asked for.
        warmup_frames: dropped after every opening.
        cv2: OpenCV, or a double of it; None imports it.
        timing: ``start_timeout_s``, ``stall_s`` and ``retry_s`` of :class:`CaptureCamera`.

    Raises:
        ConfigurationError: no OpenCV.
    """

    def __init__(
        self,
        clock: Clock,
        device: Path = DEFAULT_DEVICE,
        *,
        size: tuple[int, int] = (640, 480),
        fps: int = 30,
        warmup_frames: int = WARMUP_FRAMES,
        cv2: Any = None,
        timing: Mapping[str, float] | None = None,
    ) -> None:
        if fps <= 0:
            raise ConfigurationError(f"fps must be above 0, received {fps}")
        source = V4l2Source(load_opencv() if cv2 is None else cv2, clock, device, size, fps, warmup_frames)
        super().__init__(source, clock, **dict(timing or {}))
