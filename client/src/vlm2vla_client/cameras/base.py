"""The seam between the client and a camera: three blocking calls, each with a deadline."""

from __future__ import annotations

from typing import Protocol

from vlm2vla_schema.types import Frame


class Camera(Protocol):
    """A colour camera. Every method raises :class:`vlm2vla_client.errors.CameraError`, and none waits without end."""

    def start(self) -> None:
        """Begin capturing. Called once, before anything else; may block for the camera's own start-up deadline."""
        ...

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        """The newest frame, at most ``max_age_s`` old when it is returned; waits up to ``timeout_s`` for one."""
        ...

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        """A frame captured later than ``stamp_s`` (the clock's time); waits up to ``timeout_s`` for one."""
        ...

    def close(self) -> None:
        """Stop capturing. Safe to call twice."""
        ...
