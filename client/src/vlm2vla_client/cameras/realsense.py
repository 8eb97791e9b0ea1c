"""An Intel RealSense's colour stream, or a recording of one, through pyrealsense2 (extra ``realsense``).

Lines of librealsense named here are those of commit cacc8e701a96 (github.com/IntelRealSense/librealsense).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.cameras.capture import (
    LATENCY_FRAMES,
    WARMUP_FRAMES,
    CaptureCamera,
    CaptureTimes,
    Picture,
    RecordingEndedError,
)
from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import CameraError, ConfigurationError

INSTALL = "pip install 'vlm2vla-client[realsense]'"
QUEUED_FRAMES = 4
"""So many may wait while the capture thread does not get the processor; then the oldest is dropped."""

_WARMUP_WAIT_S = 4.0
_LOCKS = {"enable_auto_exposure": ("exposure", "gain"), "enable_auto_white_balance": ("white_balance",)}
_METADATA = {"exposure": "actual_exposure", "gain": "gain_level", "white_balance": "white_balance"}


def load_sdk() -> Any:
    """The module pyrealsense2.

    Raises:
        ConfigurationError: it is not installed, or cannot be loaded (it needs the system's libusb-1.0).
    """
    try:
        return importlib.import_module("pyrealsense2")
    except ModuleNotFoundError:
        raise ConfigurationError(f"the RealSense camera needs its driver: {INSTALL}") from None
    except ImportError as error:
        raise ConfigurationError(
            f"pyrealsense2 cannot be loaded: {error}; it needs libusb (Debian, Ubuntu: apt-get install libusb-1.0-0)"
        ) from None


class RealSenseSource:
    """The colour stream of one device or one recorded file. Arguments: see :class:`RealSenseCamera`."""

    def __init__(
        self,
        sdk: Any,
        clock: Clock,
        *,
        serial: str | None,
        file: Path | None,
        size: tuple[int, int],
        fps: int,
        warmup_frames: int,
        lock_exposure: bool,
        repeat: bool,
    ) -> None:
        self._sdk, self._clock = sdk, clock
        self._serial, self._file, self._repeat = serial, file, repeat
        self._size, self._fps, self._warmup_frames = size, fps, warmup_frames
        self._lock_exposure = lock_exposure
        self._locked: dict[str, float] = {}
        self._context: Any = None
        self._pipeline: Any = None
        self._device: Any = None
        self._queue: Any = None
        self._times = CaptureTimes(0.0)
        self._number = -1

    @property
    def name(self) -> str:
        """The device or the file."""
        return str(self._file) if self._file is not None else f"RealSense {self._serial or '(any)'}"

    def open(self) -> None:
        """Starts a new pipeline, drops the first pictures and locks the exposure. Blocks for about two seconds."""
        config = self._sdk.config()
        if self._file is not None:
            config.enable_device_from_file(str(self._file), repeat_playback=self._repeat)
            config.enable_stream(self._sdk.stream.color)
        else:
            # start() without the device would wait for it up to 3 x 5 s (pipeline.cpp:84-100).
            config.enable_device(self._find())
            config.enable_stream(self._sdk.stream.color, *self._size, self._sdk.format.rgb8, self._fps)
        self._queue = self._sdk.frame_queue(QUEUED_FRAMES)
        pipeline = self._sdk.pipeline(self._context_of_all())
        try:
            profile = pipeline.start(config, self._queue)
        except RuntimeError as error:
            raise CameraError(f"it cannot be started: {error}") from None
        self._pipeline, self._device = pipeline, profile.get_device()
        self._times, self._number = CaptureTimes(LATENCY_FRAMES / self._fps), -1
        if self._file is None:
            self._keep_the_rate()
        self._warm_up()

    def read(self, timeout_s: float) -> Picture | None:
        """The next picture, copied."""
        frame = self._next(timeout_s)
        if frame is None:
            self._look_after_the_device()
            return None
        number = int(frame.get_frame_number())
        if number == self._number:
            return None  # the same picture again is no sign of life
        self._number = number
        arrival_s = self._clock.now_s()
        if self._file is not None:  # a recording is played as if it happened now
            captured_s = arrival_s - LATENCY_FRAMES / self._fps
        else:
            captured_s = self._times.captured_s(frame.get_timestamp() / 1000.0, arrival_s)
        return Picture(self._copied(frame), captured_s, number)

    def close(self) -> None:
        """Stops the pipeline and forgets it."""
        pipeline, self._pipeline, self._queue, self._device = self._pipeline, None, None, None
        if pipeline is None:
            return
        try:
            pipeline.stop()
        except RuntimeError:
            return  # it raises when the device is gone (pipeline.cpp:181); it has stopped all the same

    def _context_of_all(self) -> Any:
        if self._context is None:
            self._context = self._sdk.context()  # one for all pipelines: it watches the bus
        return self._context

    def _find(self) -> str:
        """The serial number of the camera to use, which is plugged in."""
        serial_key = self._sdk.camera_info.serial_number
        found: list[str] = []
        for device in self._context_of_all().query_devices():
            if device.supports(serial_key):
                found.append(str(device.get_info(serial_key)))
        if not found:
            raise CameraError("no RealSense is connected: check the cable (USB 3) and its udev rules")
        if self._serial is None:
            if len(found) > 1:
                raise CameraError(f"several RealSense are connected ({', '.join(found)}): name one by its serial")
            return found[0]
        if self._serial not in found:
            raise CameraError(f"serial number {self._serial} is not connected; connected: {', '.join(found)}")
        return self._serial

    def _next(self, timeout_s: float) -> Any | None:
        # From the queue: on a timeout pipeline.try_wait_for_frames would restart itself and wait up to 15 s for the
        # device, whatever timeout it was given, without warm-up or locked exposure (pipeline.cpp:328-336).
        came, frame = self._queue.try_wait_for_frame(max(int(1000 * timeout_s), 1))
        if not came:
            return None
        frame = frame.as_frameset().get_color_frame() if frame.is_frameset() else frame.as_video_frame()
        return frame if frame else None  # a set without a colour picture gives an empty one

    def _warm_up(self) -> None:
        deadline_s = time.monotonic() + _WARMUP_WAIT_S
        dropped, frame = 0, None
        while dropped < self._warmup_frames:
            frame = self._next(0.1)
            if frame is not None:
                dropped += 1
                self._times.captured_s(frame.get_timestamp() / 1000.0, self._clock.now_s())
            elif time.monotonic() > deadline_s:
                raise CameraError(f"only {dropped} of the {self._warmup_frames} pictures of the warm-up came")
            else:
                self._look_after_the_device()
        if self._lock_exposure and self._file is None:
            self._apply_lock(frame)

    def _keep_the_rate(self) -> None:
        """In a dim room the camera would otherwise expose longer than a frame period and halve its rate."""
        sensor, option = self._device.first_color_sensor(), self._sdk.option.auto_exposure_priority
        if sensor.supports(option):
            sensor.set_option(option, 0.0)

    def _apply_lock(self, frame: Any | None) -> None:
        """Fixes exposure, gain and white balance where automatics left them; reopened, to the same values as before."""
        sensor = self._device.first_color_sensor()
        for automatic, names in _LOCKS.items():
            switch = getattr(self._sdk.option, automatic)
            if not sensor.supports(switch):
                continue
            values = {name: self._locked.get(name, self._in_force(sensor, frame, name)) for name in names}
            # Off first: a value written while the automatics are on is overwritten by them.
            sensor.set_option(switch, 0.0)
            for name, value in values.items():
                sensor.set_option(getattr(self._sdk.option, name), value)
            self._locked.update(values)

    def _in_force(self, sensor: Any, frame: Any | None, name: str) -> float:
        """The picture's own note says what the automatics chose; the option may still say what was last set by hand."""
        key = getattr(self._sdk.frame_metadata_value, _METADATA[name])
        if frame is not None and frame.supports_frame_metadata(key):
            return float(frame.get_frame_metadata(key))
        return float(sensor.get_option(getattr(self._sdk.option, name)))

    def _look_after_the_device(self) -> None:
        if self._file is None:
            if not self._device.is_connected():
                raise CameraError("it was unplugged, or its USB port lost it: plug it in again")
        elif not self._repeat and self._device.as_playback().current_status() == self._sdk.playback_status.stopped:
            raise RecordingEndedError("the recording has ended")

    def _copied(self, frame: Any) -> NDArray[np.uint8]:
        """The picture in memory of its own: the SDK's buffer goes to a later frame as soon as this one is released, and
        frames kept from it stop the stream (frame-archive.h: published_frames_count)."""
        form = frame.get_profile().format()
        view = np.asarray(frame.get_data())
        if view.dtype != np.uint8 or view.ndim != 3 or form not in (self._sdk.format.rgb8, self._sdk.format.bgr8):
            raise CameraError(f"its colour stream is {form}; expected rgb8 or bgr8: record it so")
        return np.array(view if form == self._sdk.format.rgb8 else view[:, :, ::-1], order="C")


class RealSenseCamera(CaptureCamera):
    """A RealSense (D435 in the paper's set-up), or a file recorded from one, as a Camera.

    Args:
        clock: dates the frames.
        serial: which camera; needed when several are connected.
        file: a recording (.db3, .bag) played at its own pace instead of a device.
        size: width and height of the stream, pixels; a file has its own.
        fps: pictures a second; for a file only the assumed latency depends on it.
        warmup_frames: dropped after every opening; default 30, for a file 0.
        lock_exposure: after the warm-up, fix exposure, gain and white balance until the camera is closed.
        repeat: a file begins anew at its end; otherwise its end is a CameraError.
        sdk: pyrealsense2, or a double of it; None imports it.
        timing: ``start_timeout_s``, ``stall_s`` and ``retry_s`` of :class:`CaptureCamera`.

    Raises:
        ConfigurationError: no pyrealsense2, or no such file.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        serial: str | None = None,
        file: Path | None = None,
        size: tuple[int, int] = (640, 480),
        fps: int = 30,
        warmup_frames: int | None = None,
        lock_exposure: bool = False,
        repeat: bool = False,
        sdk: Any = None,
        timing: Mapping[str, float] | None = None,
    ) -> None:
        if file is not None and not file.is_file():
            raise ConfigurationError(f"no recording {file}")
        if warmup_frames is None:
            warmup_frames = WARMUP_FRAMES if file is None else 0
        source = RealSenseSource(
            load_sdk() if sdk is None else sdk,
            clock,
            serial=serial,
            file=file,
            size=size,
            fps=fps,
            warmup_frames=warmup_frames,
            lock_exposure=lock_exposure,
            repeat=repeat,
        )
        super().__init__(source, clock, **dict(timing or {}))
