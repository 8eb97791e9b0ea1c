"""A camera of the real world in front of the twin's arm: the plan for a real bench is rehearsed on a simulated one."""

from __future__ import annotations

from dataclasses import replace

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.clock import Clock
from vlm2vla_schema.types import Frame


class RehearsalCamera:
    """Gives a real camera's frames the twin's time.

    The twin's clock advances only when somebody sleeps on it, the real camera's all the time; a frame keeps its age.

    Args:
        camera: the real one.
        own: the clock that dates its frames.
        shown: the clock that its frames shall be dated by.
    """

    def __init__(self, camera: Camera, own: Clock, shown: Clock) -> None:
        self._camera, self._own, self._shown = camera, own, shown

    def start(self) -> None:
        """Starts the real camera."""
        self._camera.start()

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        """The real camera's newest frame."""
        return self._dated(self._camera.latest(max_age_s, timeout_s))

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        """A frame that the real camera takes from now on, at a time of the twin later than ``stamp_s``."""
        frame = self._camera.after(self._own.now_s(), timeout_s)
        self._shown.sleep_s(max(stamp_s - self._dated(frame).stamp_s, 0.0) + 0.002)
        return replace(frame, stamp_s=max(self._dated(frame).stamp_s, stamp_s + 0.001))

    def close(self) -> None:
        """Closes the real camera."""
        self._camera.close()

    def _dated(self, frame: Frame) -> Frame:
        return replace(frame, stamp_s=self._shown.now_s() - (self._own.now_s() - frame.stamp_s))
