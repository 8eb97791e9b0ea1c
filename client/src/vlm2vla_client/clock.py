"""The one source of time of the client: everything that waits or takes an age asks a Clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic time. The twin's clock advances physics while it sleeps; the system's just sleeps."""

    def now_s(self) -> float:
        """Seconds on a monotonic scale whose zero means nothing."""
        ...

    def sleep_s(self, duration_s: float) -> None:
        """Let ``duration_s`` seconds pass (none when it is zero or less). Blocks."""
        ...


class SystemClock:
    """Wall time, for a physical arm and camera."""

    def now_s(self) -> float:
        """Seconds of the operating system's monotonic clock."""
        return time.monotonic()

    def sleep_s(self, duration_s: float) -> None:
        """Sleep; a duration of zero or less returns at once."""
        if duration_s > 0.0:
            time.sleep(duration_s)
