"""What must hold while the arm moves: somebody still answers, and the camera still sees (the executor's Monitor)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.errors import CameraError, ClientError, ServerUnreachableError
from vlm2vla_client.policies.base import Policy

LIVENESS_LIMIT_S = 1.0
POLL_S = 0.1
ALIVE_TIMEOUT_S = 0.5
CAMERA_LIMIT_S = 0.5


class Watch:
    """Asks the policy for a sign of life from a thread of its own, only while the arm moves.

    Ages are wall time, whatever the episode's clock does: a server dies in wall time.

    Args:
        policy: asked ``alive`` every 0.2 s.
        camera: when given, must have a frame at most 0.5 s old; leave out where a picture is made on demand.
        silence_limit_s: how long the policy may be silent while the arm moves.
    """

    def __init__(
        self, policy: Policy, camera: Camera | None = None, *, silence_limit_s: float = LIVENESS_LIMIT_S
    ) -> None:
        self._policy = policy
        self._camera = camera
        self._silence_limit_s = silence_limit_s
        self._alive_s = time.monotonic()
        self._active = False
        self._camera_error: CameraError | None = None
        self._error: ClientError | None = None
        self._failed: Callable[[], ClientError | None] | None = None

    @property
    def error(self) -> ClientError | None:
        """The typed error behind the last fault."""
        return self._error

    def fault(self) -> str | None:
        """Why the arm must stop, or None; always None when nothing moves. Returns at once."""
        if not self._active:
            return None
        silent_s = time.monotonic() - self._alive_s
        if silent_s > self._silence_limit_s:
            self._error = ServerUnreachableError(
                f"no sign of life from the policy for {silent_s:.1f} s while the arm moved", code="liveness"
            )
        elif self._camera_error is not None:
            self._error = self._camera_error
        elif self._failed is not None and (failure := self._failed()) is not None:
            self._error = failure
        return None if self._error is None else str(self._error)

    def check(self) -> None:
        """Raises the typed error behind ``fault``, if there is one.

        Raises:
            ClientError: the policy or the camera was lost while the arm moved.
        """
        if self.fault() is not None and self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def moving(self, failed: Callable[[], ClientError | None] | None = None) -> Iterator[None]:
        """Polls while the block runs.

        Args:
            failed: says at once whether the answer that is being executed has ended badly.
        """
        stop = threading.Event()
        self._alive_s = time.monotonic()
        self._error, self._camera_error, self._failed = None, None, failed
        thread = threading.Thread(target=self._poll, args=(stop,), name="watch", daemon=True)
        self._active = True
        thread.start()
        try:
            yield
        finally:
            self._active = False
            stop.set()
            thread.join(ALIVE_TIMEOUT_S + POLL_S)

    def _poll(self, stop: threading.Event) -> None:
        while not stop.wait(POLL_S):
            if self._policy.alive(ALIVE_TIMEOUT_S):
                self._alive_s = time.monotonic()
            if self._camera is not None:
                self._look(self._camera)

    def _look(self, camera: Camera) -> None:
        try:
            camera.latest(CAMERA_LIMIT_S, 0.0)
        except CameraError as error:
            self._camera_error = error
