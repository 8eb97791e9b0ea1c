"""A video file as a camera."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.cameras.capture import CaptureCamera, RecordingEndedError
from vlm2vla_client.cameras.opencv import load_opencv, rgb
from vlm2vla_client.cameras.recorded import RecordedSource
from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import ConfigurationError

MOST_FPS = 240.0
"""A file whose header claims more does not know its rate."""


class VideoCamera(CaptureCamera):
    """Plays a video file at its own rate.

    Args:
        file: anything that OpenCV's decoder reads (.mp4, .avi, .mkv, ...).
        repeat: begin anew after the last picture; otherwise the end is a CameraError.

    Raises:
        ConfigurationError: no such file, or no OpenCV.
    """

    def __init__(self, clock: Clock, file: Path, *, repeat: bool = False) -> None:
        if not file.is_file():
            raise ConfigurationError(f"no video {file}")
        self._file, self._cv2 = file, load_opencv()
        super().__init__(RecordedSource(str(file), self._pictures, self._period_s, clock, repeat=repeat), clock)

    def _open_file(self) -> Any:
        capture = self._cv2.VideoCapture(str(self._file))
        if not capture.isOpened():
            raise RecordingEndedError("it is no video that can be read")
        return capture

    def _period_s(self) -> float:
        capture = self._open_file()
        try:
            fps = float(capture.get(self._cv2.CAP_PROP_FPS))
        finally:
            capture.release()
        if not 0.0 < fps <= MOST_FPS:
            raise RecordingEndedError(f"it does not say its rate (found {fps:g} pictures a second)")
        return 1.0 / fps

    def _pictures(self) -> Iterator[NDArray[np.uint8]]:
        capture = self._open_file()
        try:
            while True:
                came, image = capture.read()
                if not came:
                    return
                yield rgb(image)
        finally:
            capture.release()
