"""The camera that the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.cameras.images import BRIDGE_FPS, ImagesCamera
from vlm2vla_client.cameras.realsense import RealSenseCamera
from vlm2vla_client.cameras.v4l2 import DEFAULT_DEVICE, V4l2Camera
from vlm2vla_client.cameras.video import VideoCamera
from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import ConfigurationError

_USES = {
    "realsense": ("serial", "file", "lock_exposure", "repeat"),
    "video": ("file", "repeat"),
    "images": ("file", "fps", "repeat"),
    "v4l2": ("device",),
}


@dataclass(frozen=True)
class CameraOptions:
    """The flags ``--camera`` and ``--camera-...``; None or False where not given.

    Attributes:
        name: realsense, video, images or v4l2.
        file: the recording: a video, a folder of pictures, or a RealSense's .db3 or .bag.
    """

    name: str
    serial: str | None = None
    file: Path | None = None
    device: Path | None = None
    fps: float | None = None
    lock_exposure: bool = False
    repeat: bool = False

    @property
    def plays_recording(self) -> bool:
        """It shows the past: nothing that it shows may move a physical arm."""
        return self.file is not None


def open_camera(options: CameraOptions, clock: Clock) -> Camera:
    """The camera, not yet started.

    Raises:
        ConfigurationError: a flag that this camera does not know or lacks, a missing file, a missing extra.
    """
    if options.name not in _USES:
        raise ConfigurationError(f"unknown camera {options.name!r}; known are {', '.join(_USES)}, and the twin's")
    for flag in ("serial", "file", "device", "fps", "lock_exposure", "repeat"):
        if getattr(options, flag) and flag not in _USES[options.name]:
            raise ConfigurationError(f"--camera-{flag.replace('_', '-')} means nothing to the camera {options.name}")
    if options.repeat and options.file is None:
        raise ConfigurationError("--camera-repeat needs a recording: give --camera-file too")
    if options.name == "v4l2":
        return V4l2Camera(clock, options.device or DEFAULT_DEVICE)
    if options.name == "realsense":
        return RealSenseCamera(
            clock,
            serial=options.serial,
            file=options.file,
            lock_exposure=options.lock_exposure,
            repeat=options.repeat,
        )
    if options.file is None:
        what = "a video file" if options.name == "video" else "a folder of pictures"
        raise ConfigurationError(f"--camera {options.name} needs --camera-file: {what}")
    if options.name == "video":
        return VideoCamera(clock, options.file, repeat=options.repeat)
    return ImagesCamera(clock, options.file, fps=options.fps or BRIDGE_FPS, repeat=options.repeat)
