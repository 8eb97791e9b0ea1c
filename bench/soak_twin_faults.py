"""What may go wrong in `soak_twin.py`: the kinds of fault, and a camera, a verifier and a robot that can suffer them.

The wrapped parts behave until a fault of theirs is active. The arm, its physics and the client are the real ones.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vlm2vla_client.errors import CameraError, RobotError, VerifierError
from vlm2vla_client.robots.base import FloatArray, RobotCapabilities
from vlm2vla_client.robots.twin import TwinClock, TwinRobot
from vlm2vla_client.safety import RobotState
from vlm2vla_client.verifiers.twin import TruthCamera, TwinVerifier
from vlm2vla_schema.types import Frame, Verdict
from vlm2vla_twin.physics import World

HOLD_S = 0.25
DRAW_EVERY_S = 0.1
LATENESSES = 100_000
PUSH_M, PUSH_S = 0.015, 0.1


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    still_after_s: no command may come later than so many seconds after the fault, by contracts.md: what it takes to
        observe it, and 0.25 s to hold. None when the episode rightly goes on.
    exits: how the episode may end.
    observed: counted from the moment that the client was given the fault, not from when it was injected.
    wall: by the wall clock, as a server dies; the others by the bench's clock, which a busy computer slows down.
    ends: the recording has its `end`; else it may lack it, as the disk takes no more.
    """

    still_after_s: float | None
    exits: tuple[int, ...]
    observed: bool = False
    wall: bool = False
    ends: bool = True


KINDS: dict[str, Kind] = {
    "server killed": Kind(1.0 + HOLD_S, (4,), wall=True),
    "server half-open": Kind(1.0 + HOLD_S, (4,), wall=True),
    "server stalled 5 s": Kind(1.0 + HOLD_S, (0, 3, 4), wall=True),
    "corrupt JSON": Kind(HOLD_S, (4,), observed=True, wall=True),
    "rows reordered": Kind(HOLD_S, (4,), observed=True, wall=True),
    "rows twice": Kind(None, (0, 3)),
    "answer late": Kind(None, (0, 3, 4, 5)),
    "camera frozen": Kind(0.5 + HOLD_S, (6,)),
    "camera gone": Kind(0.5 + HOLD_S, (6,)),
    "arm silent": Kind(HOLD_S, (7,)),
    "arm's state stale": Kind(0.25 + HOLD_S, (7,)),
    "arm stuck": Kind(None, (0, 3, 5)),
    "no IK solution": Kind(HOLD_S, (7,), observed=True),
    "verifier fails": Kind(HOLD_S, (3,), observed=True),
    "verifier crashes": Kind(HOLD_S, (3,), observed=True),
    "arm moved since capture": Kind(None, (0, 3, 5)),
    "operator's key": Kind(None, (0, 3)),
    "operator's Ctrl-C": Kind(HOLD_S, (130,), wall=True),
    "disk below the floor": Kind(HOLD_S, (3,), observed=True),
    "disk full": Kind(HOLD_S, (3,), ends=False),
    "client killed": Kind(None, (-signal.SIGKILL,), ends=False),
}


@dataclass
class Faults:
    """The fault of the running episode, if it has one; asked from several threads.

    clock_s: the bench's clock.
    """

    clock_s: Callable[[], float] = time.monotonic
    kind: str | None = None
    injected_s: tuple[float, float] | None = None
    observed_s: tuple[float, float] | None = None
    cleared: threading.Event = field(default_factory=threading.Event)

    def now(self) -> tuple[float, float]:
        """(wall, bench's clock)."""
        return time.monotonic(), self.clock_s()

    def inject(self, kind: str) -> None:
        self.injected_s = self.now()
        self.kind = kind

    def clear(self) -> None:
        self.kind = None
        self.cleared.set()

    def begin(self, clock_s: Callable[[], float]) -> None:
        """A new episode."""
        self.clock_s, self.kind, self.injected_s, self.observed_s = clock_s, None, None, None
        self.cleared.clear()

    def meets(self, kind: str) -> bool:
        """Whether this kind is active; from now on it counts as observed."""
        if self.kind != kind:
            return False
        self.observed_s = self.observed_s or self.now()
        return True

    @property
    def from_s(self) -> tuple[float, float] | None:
        """What the kind's limit is counted from."""
        if self.kind is None:
            return None
        return self.observed_s if KINDS[self.kind].observed else self.injected_s


class PlainPictures:
    """Grey pictures with the time they were made: neither the expert nor the twin's verifier looks at them."""

    def __init__(self, clock: TwinClock) -> None:
        self._clock, self._count = clock, 0

    def start(self) -> None:
        """Nothing to open."""

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        self._count += 1
        image = np.full((120, 160, 3), self._count % 256, dtype=np.uint8)
        return Frame(image, self._clock.now_s(), f"{self._count:06d}")

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        return self.latest(0.0, timeout_s)

    def close(self) -> None:
        """Nothing to close."""


class DrivenCamera:
    """A camera that delivers by itself: a picture every tenth of a second while the clock advances, for every thread.

    Only the thread that owns the world takes pictures; others get the newest, or a CameraError when it is too old.
    """

    def __init__(self, world: World, clock: TwinClock, faults: Faults) -> None:
        self._truth = TruthCamera(PlainPictures(clock), world)
        self._clock, self._faults = clock, faults
        self._owner = threading.get_ident()
        self._frame: Frame | None = None

    @property
    def truth(self) -> TruthCamera:
        """For the twin's verifier."""
        return self._truth

    def start(self) -> None:
        self._truth.start()
        self._draw()
        self._clock.on_advance.append(self._draw)

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        return self._give(lambda frame: self._clock.now_s() - frame.stamp_s <= max_age_s, timeout_s)

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        while self._clock.now_s() <= stamp_s:
            self._clock.sleep_s(0.02)
        return self._give(lambda frame: frame.stamp_s > stamp_s, timeout_s)

    def close(self) -> None:
        if self._draw in self._clock.on_advance:
            self._clock.on_advance.remove(self._draw)
        self._truth.close()

    def _draw(self) -> None:
        if self._faults.kind in ("camera frozen", "camera gone"):
            return
        if self._frame is None or self._clock.now_s() - self._frame.stamp_s >= DRAW_EVERY_S:
            self._frame = self._truth.latest(0.0, 0.0)

    def _give(self, good: Callable[[Frame], bool], timeout_s: float) -> Frame:
        ends_s = time.monotonic() + timeout_s
        while True:
            if self._faults.meets("camera gone"):
                raise CameraError("the camera is gone")
            if threading.get_ident() == self._owner:
                self._draw()
            if self._frame is not None and good(self._frame):
                return self._frame
            if time.monotonic() >= ends_s:
                raise CameraError(f"no picture that is new enough within {timeout_s:.2f} s")
            time.sleep(0.02)


class Lateness(threading.Thread):
    """How late this computer wakes a thread that slept 20 ms: what nobody in this process can be blamed for."""

    def __init__(self) -> None:
        super().__init__(name="lateness", daemon=True)
        self._late = np.zeros((LATENESSES, 2))  # at once, or it would look like a leak of the client's
        self._count = 0

    def run(self) -> None:
        while True:
            began_s = time.monotonic()
            time.sleep(0.02)
            self._late[self._count % LATENESSES] = began_s, time.monotonic() - began_s - 0.02
            self._count += 1

    def worst_s(self, from_s: float, to_s: float) -> float:
        """The largest between two moments of the wall clock."""
        at_s, late_s = self._late[: self._count].T
        return float(late_s[(from_s - 0.5 <= at_s) & (at_s <= to_s)].max(initial=0.0))


class FaultyRobot:
    """The twin's arm, which can be pushed, and whose driver can fall silent, repeat a state or find no angles."""

    def __init__(self, arm: TwinRobot, faults: Faults, clock: TwinClock) -> None:
        self._arm, self._faults, self._clock = arm, faults, clock
        self._pushed = False
        self._last: RobotState | None = None

    @property
    def capabilities(self) -> RobotCapabilities:
        return self._arm.capabilities

    def connect(self) -> None:
        self._arm.connect()

    def state(self) -> RobotState:
        if self._faults.meets("arm silent"):
            raise RobotError("the arm does not answer")
        if self._faults.meets("arm's state stale") and self._last is not None:
            return self._last
        if self._faults.meets("arm moved since capture") and not self._pushed:
            self._push()
        self._last = self._arm.state()
        return replace(self._last)

    def _push(self) -> None:
        """Somebody moves the arm a little way up, once."""
        self._pushed, here = True, self._arm.state()
        self._arm.command(here.ee_position_m + np.array([0.0, 0.0, PUSH_M]), np.asarray(here.ee_rotation), PUSH_S)
        self._clock.sleep_s(2.0 * PUSH_S)

    def contacts(self) -> frozenset[str]:
        return self._arm.contacts()

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        if self._faults.meets("no IK solution"):
            raise RobotError(f"no joint angles reach {np.round(position_m, 3).tolist()} m")
        if not self._faults.meets("arm stuck"):
            self._arm.command(position_m, rotation, duration_s)

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        if not self._faults.meets("arm stuck"):
            self._arm.set_gripper(open_, deadline_s)

    def hold(self, reason: str) -> None:
        self._arm.hold(reason)

    def close(self) -> None:
        self._arm.close()


class FaultyVerifier(TwinVerifier):
    """The twin's verifier, which can give no verdict."""

    def __init__(self, world: World, camera: TruthCamera, faults: Faults) -> None:
        super().__init__(world, camera)
        self._faults = faults

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        if self._faults.meets("verifier fails"):
            raise VerifierError("no verdict")
        if self._faults.meets("verifier crashes"):
            raise ZeroDivisionError("a verifier's own mistake")
        return super().verify(before, after, subtask, next_subtask, deadline_s)


def full_disk(events: Path) -> None:
    """From now on the kernel refuses to let this recording's events grow, as a full disk would."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 20, hard))


def roomy_disk() -> None:
    """The end of `full_disk`."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def press_ctrl_c() -> None:
    """What a terminal sends: the main thread gets KeyboardInterrupt wherever it is."""
    os.kill(os.getpid(), signal.SIGINT)
