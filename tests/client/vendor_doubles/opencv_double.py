"""A double of OpenCV's VideoCapture over V4L2, with its traps (opencv/opencv, modules/videoio/src/cap_v4l.cpp, 4.x).

- a device that is absent or busy raises nothing: ``isOpened`` is False;
- a stall blocks ``read`` for the select timeout (10 s; shorter here); then it gives (False, None), like an unplug;
- pictures are BGR; a size that the camera lacks is ignored without a word;
- CAP_PROP_POS_MSEC is the kernel's stamp of the picture last read, on a clock of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

STALL_S = 0.5


@dataclass(eq=False)
class UsbCameraDouble:
    """/dev/videoN; a test plugs, stalls and delays it from its own thread."""

    fps: int = 30
    plugged: bool = True
    stalled: bool = False
    late_s: float = 0.0
    stamps: bool = True
    opened: int = 0
    released: int = 0
    asked: dict[int, float] = field(default_factory=dict)


class CaptureDouble:
    def __init__(self, camera: UsbCameraDouble | None) -> None:
        self._camera = camera
        self._began_s, self._number, self._stamp_ms = time.monotonic(), 0, 0.0
        if camera is not None and camera.plugged:
            camera.opened += 1

    def isOpened(self) -> bool:
        return self._camera is not None and self._camera.plugged

    def set(self, key: int, value: float) -> bool:
        if self._camera is not None:
            self._camera.asked[key] = value
        return True

    def get(self, key: int) -> float:
        assert key == OpenCvDouble.CAP_PROP_POS_MSEC and self._camera is not None
        return self._stamp_ms if self._camera.stamps else 0.0

    def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
        camera = self._camera
        assert camera is not None
        until_s = time.monotonic() + STALL_S
        while time.monotonic() < until_s and camera.plugged:
            number = int((time.monotonic() - self._began_s) * camera.fps)
            stamp_ms = 1000.0 * (time.monotonic() + 5000.0 - camera.late_s)
            if number > self._number and not camera.stalled and stamp_ms > self._stamp_ms:
                self._number, self._stamp_ms = number, stamp_ms
                image = np.zeros((48, 64, 3), dtype=np.uint8)
                image[...] = (30, 20, 10)
                return True, image
            time.sleep(0.002)
        return False, None

    def release(self) -> None:
        if self._camera is not None:
            self._camera.released += 1


class OpenCvDouble:
    """Stands in for the module."""

    CAP_V4L2 = 200
    CAP_PROP_POS_MSEC = 0
    CAP_PROP_FRAME_WIDTH = 3
    CAP_PROP_FRAME_HEIGHT = 4
    CAP_PROP_FPS = 5
    CAP_PROP_BUFFERSIZE = 38

    def __init__(self, cameras: dict[int, UsbCameraDouble]) -> None:
        self._cameras = cameras

    def VideoCapture(self, index: int, backend: int) -> CaptureDouble:
        assert backend == self.CAP_V4L2
        return CaptureDouble(self._cameras.get(index))
