"""A folder of pictures as a camera, such as ``frames/`` of a recorded episode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.cameras.capture import CaptureCamera, RecordingEndedError
from vlm2vla_client.cameras.recorded import RecordedSource
from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.pictures import read_picture

BRIDGE_FPS = 5.0
"""The rate of bridge_data_robot, which recorded the Bridge data."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ImagesCamera(CaptureCamera):
    """Shows the pictures of a folder in the order of their names.

    Args:
        folder: holds .jpg, .png or .webp files; others are left out.
        fps: pictures a second.
        repeat: begin anew after the last picture; otherwise the end is a CameraError.

    Raises:
        ConfigurationError: no such folder, or no picture in it.
    """

    def __init__(self, clock: Clock, folder: Path, *, fps: float = BRIDGE_FPS, repeat: bool = False) -> None:
        if not folder.is_dir():
            raise ConfigurationError(f"no folder {folder}")
        self._files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not self._files:
            raise ConfigurationError(f"no picture in {folder}: expected files that end in {', '.join(SUFFIXES)}")
        super().__init__(RecordedSource(str(folder), self._pictures, lambda: 1.0 / fps, clock, repeat=repeat), clock)

    def _pictures(self) -> Iterator[NDArray[np.uint8]]:
        for path in self._files:
            try:
                yield read_picture(path)
            except ConfigurationError as error:
                raise RecordingEndedError(str(error)) from None
