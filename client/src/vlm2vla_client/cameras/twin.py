"""The twin's third-person camera: a picture is drawn when it is asked for."""

from __future__ import annotations

from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import CameraError
from vlm2vla_schema.types import Frame
from vlm2vla_twin.camera import Camera as Renderer
from vlm2vla_twin.camera import RenderingUnavailableError
from vlm2vla_twin.physics import World


class TwinCamera:
    """640x480 RGB of a simulated world, stamped with the clock that drives it."""

    def __init__(self, world: World, clock: Clock, width: int = 640, height: int = 480) -> None:
        self._world, self._clock = world, clock
        self._size = (width, height)
        self._renderer: Renderer | None = None
        self._count = 0

    def start(self) -> None:
        """Open the renderer. Raises CameraError when this machine has no headless OpenGL."""
        try:
            self._renderer = Renderer(self._world, *self._size)
        except RenderingUnavailableError as error:
            raise CameraError(str(error)) from error

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        """The world as it is now; never older than any ``max_age_s``, never waits."""
        return self._draw()

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        """The world at a time later than ``stamp_s``; advances the clock if that has not come yet.

        Raises CameraError when it lies more than ``timeout_s`` ahead.
        """
        ahead_s = stamp_s - self._clock.now_s()
        if ahead_s > timeout_s:
            raise CameraError(f"a frame {ahead_s:.2f} s ahead was asked for, within {timeout_s:.2f} s")
        if ahead_s >= 0.0:
            self._clock.sleep_s(ahead_s + 0.002)
        return self._draw()

    def close(self) -> None:
        """Forget the renderer; its OpenGL context serves the whole process and stays."""
        self._renderer = None

    def _draw(self) -> Frame:
        if self._renderer is None:
            raise CameraError("the camera is not started: call start() first")
        # Stamped before drawing: the picture shows the world no earlier than its stamp says.
        stamp_s = self._clock.now_s()
        try:
            image = self._renderer.rgb()
        except (RuntimeError, TimeoutError) as error:
            raise CameraError(f"rendering failed: {error}") from error
        frame = Frame(image=image, stamp_s=stamp_s, frame_id=f"{self._count:06d}")
        self._count += 1
        return frame
