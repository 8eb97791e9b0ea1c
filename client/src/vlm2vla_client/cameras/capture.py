"""A camera that delivers at its own pace: one thread takes every picture, whoever asks gets the newest.

A driver may stall, lose its device or raise anything; only the thread meets that. Callers wait on a condition with
their own deadline, so a dead camera costs them ``timeout_s`` and no more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import CameraError
from vlm2vla_schema.types import Frame

READ_S = 0.1
"""How long one read waits for a picture: also how soon the thread notices that it shall end."""

WARMUP_FRAMES = 30
"""The first pictures of a live camera are dark or bright until its automatic exposure has settled."""

LATENCY_FRAMES = 2.0
"""From the middle of an exposure to its arrival, in frame periods, at most: exposure, read-out, USB."""

CLOSE_WAIT_S = 3.0
OFFSETS_KEPT = 300


class RecordingEndedError(CameraError):
    """A recording has no more pictures; opening it again would only show them once more."""


@dataclass(frozen=True)
class Picture:
    """One picture of a source.

    Attributes:
        image: uint8 [H, W, 3], RGB, in memory that nobody else writes to.
        captured_s: when it was captured, on the client's clock; when in doubt too early, never too late.
        number: the device's own count; a gap is a picture that was lost before it reached the client.
    """

    image: NDArray[np.uint8]
    captured_s: float
    number: int


class Source(Protocol):
    """Where pictures come from. Every method is called by the capture thread alone."""

    @property
    def name(self) -> str:
        """What error texts call it, such as ``RealSense 0123``."""
        ...

    def open(self) -> None:
        """Start delivering. May block for seconds. Raises CameraError; is then closed and opened again later."""
        ...

    def read(self, timeout_s: float) -> Picture | None:
        """The next picture, or None when ``timeout_s`` passed without one. Raises CameraError: it must be reopened."""
        ...

    def close(self) -> None:
        """Let go of the device. Raises nothing; safe to call twice and before ``open``."""
        ...


@dataclass(frozen=True)
class CaptureStats:
    """Since ``start``: pictures taken, pictures lost on the way (gaps in the device's count), times it was reopened."""

    captured: int
    lost: int
    reopened: int


class CaptureTimes:
    """A device's time stamps on the client's clock.

    The offset between the two clocks is the smallest that recent pictures had between their stamp and their arrival:
    the fastest delivery. So a picture that waited in a queue is dated when it was taken, not when it was read.

    Args:
        latency_s: what the fastest delivery itself takes, exposure included; subtracted.
    """

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._offsets: deque[float] = deque(maxlen=OFFSETS_KEPT)  # ten seconds: clocks drift apart slowly
        self._last_s = float("-inf")

    def captured_s(self, device_s: float, arrival_s: float) -> float:
        """When a picture stamped ``device_s`` by its device, read at ``arrival_s``, was captured."""
        if device_s <= self._last_s:
            self._offsets.clear()  # the device's clock began anew
        self._last_s = device_s
        self._offsets.append(arrival_s - device_s)
        return device_s + min(self._offsets) - self._latency_s


class CaptureCamera:
    """The Camera protocol over a source that delivers by itself.

    Args:
        source: opened, read and closed in the capture thread; reopened when it stalls or fails.
        clock: dates the pictures and their ages.
        start_timeout_s: how long ``start`` waits for the first picture.
        stall_s: without a picture for so long, the source is reopened.
        retry_s: between closing a source and opening it again.
    """

    def __init__(
        self,
        source: Source,
        clock: Clock,
        *,
        start_timeout_s: float = 10.0,
        stall_s: float = 1.0,
        retry_s: float = 0.5,
    ) -> None:
        self._source, self._clock = source, clock
        self._start_timeout_s, self._stall_s, self._retry_s = start_timeout_s, stall_s, retry_s
        self._arrived = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._frame: Frame | None = None
        self._problem = ""
        self._ended = False
        self._captured = self._lost = self._opened = 0

    def start(self) -> None:
        """Starts the capture thread and waits for the first picture. Raises CameraError and stops again without one."""
        if self._thread is not None:
            raise CameraError(f"{self._source.name} was started before; make a new camera")
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()
        try:
            self._wait(lambda frame: True, self._start_timeout_s, "gave no picture")
        except BaseException:
            self.close()
            raise

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        """The newest frame, at most ``max_age_s`` old when it is returned. Raises CameraError after ``timeout_s``."""

        def young(frame: Frame) -> bool:
            return self._clock.now_s() - frame.stamp_s <= max_age_s

        return self._wait(young, timeout_s, f"gave no picture at most {max_age_s:.2f} s old")

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        """A frame captured later than ``stamp_s``. Raises CameraError after ``timeout_s``."""
        return self._wait(lambda frame: frame.stamp_s > stamp_s, timeout_s, "gave no picture later than the one asked")

    def close(self) -> None:
        """Stops the thread. A driver that does not return is left behind after 3 s: it must not hold the program."""
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_WAIT_S)
        with self._arrived:
            self._frame = None
            self._arrived.notify_all()

    def stats(self) -> CaptureStats:
        """Counts since ``start``; does not block."""
        with self._arrived:
            return CaptureStats(self._captured, self._lost, max(self._opened - 1, 0))

    def _wait(self, good: Callable[[Frame], bool], timeout_s: float, complaint: str) -> Frame:
        # By the system's clock: a simulated one does not pass while this waits.
        deadline_s = time.monotonic() + timeout_s
        with self._arrived:
            while True:
                if self._thread is None or self._closing.is_set():
                    raise CameraError(f"{self._source.name} is not started: call start() first")
                if self._frame is not None and good(self._frame):
                    return self._frame
                left_s = deadline_s - time.monotonic()
                if left_s <= 0.0 or self._ended:
                    raise CameraError(self._complaint(complaint, timeout_s))
                self._arrived.wait(left_s)

    def _complaint(self, complaint: str, timeout_s: float) -> str:
        text = f"{self._source.name} {complaint} within {timeout_s:.2f} s"
        if self._frame is not None:
            text += f"; its newest is {self._clock.now_s() - self._frame.stamp_s:.2f} s old"
        return f"{text}: {self._problem}" if self._problem else text

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._pump()
            except RecordingEndedError as error:
                self._note(str(error), ended=True)
                return
            except CameraError as error:
                self._note(str(error))
            except Exception as error:  # a driver may raise anything; unseen, the thread would be gone
                self._note(f"{type(error).__name__}: {error}")
            finally:
                self._source.close()
            self._closing.wait(self._retry_s)

    def _pump(self) -> None:
        self._source.open()
        with self._arrived:
            self._opened += 1
        last_s = time.monotonic()
        number: int | None = None
        while not self._closing.is_set():
            picture = self._source.read(READ_S)
            silent_s = time.monotonic() - last_s
            if picture is not None:
                self._publish(picture, number)
                last_s, number = time.monotonic(), picture.number
            elif silent_s > self._stall_s:
                raise CameraError(f"no picture for {silent_s:.1f} s; it is being reopened")

    def _publish(self, picture: Picture, before: int | None) -> None:
        picture.image.setflags(write=False)  # handed out to several: nobody may change it for the others
        with self._arrived:
            if self._closing.is_set():
                return
            self._frame = Frame(picture.image, picture.captured_s, f"{self._captured:06d}")
            self._captured += 1
            self._lost += 0 if before is None else max(picture.number - before - 1, 0)
            self._problem = ""
            self._arrived.notify_all()

    def _note(self, problem: str, *, ended: bool = False) -> None:
        with self._arrived:
            self._problem, self._ended = problem, ended
            self._arrived.notify_all()
