"""From three touched points to the height of the counter: pure arithmetic, and what makes three points useless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.safety_types import CONTACT_MARGIN_M

FloatArray = NDArray[np.float64]

#: Points nearer than this to one another, or to the line through the other two, say little about a tilt: 1 mm of a
#: person's judgement would be 1.4 degrees.
MIN_APART_M: Final = 0.08
MIN_OFF_LINE_M: Final = 0.04
MAX_TILT_RAD: Final = math.radians(1.5)


@dataclass(frozen=True)
class Counter:
    """What three touches say. ``spread_m``: the farthest of them from ``counter_z_m``, which is their mean."""

    counter_z_m: float
    tilt_rad: float
    spread_m: float

    @property
    def problem(self) -> str | None:
        """Why one height does not describe this counter, or None.

        The filter knows one height and stops 3 mm above it: a counter farther from it would be pushed into.
        """
        if self.tilt_rad > MAX_TILT_RAD:
            return (
                f"the counter tilts by {math.degrees(self.tilt_rad):.1f} degrees against the arm's base (at most "
                f"{math.degrees(MAX_TILT_RAD):.1f}): level one of them, or a touch was none"
            )
        if self.spread_m > CONTACT_MARGIN_M:
            return (
                f"a point lies {1000 * self.spread_m:.1f} mm from the mean height (at most "
                f"{1000 * CONTACT_MARGIN_M:.0f}): level the arm's base, or touch again more carefully"
            )
        return None


def useless(points: Sequence[FloatArray]) -> str | None:
    """Why the newest of two or three points [3] cannot be used with the others, or None."""
    flat = [np.asarray(point, dtype=np.float64)[:2] for point in points]
    for other in flat[:-1]:
        apart_m = float(np.linalg.norm(flat[-1] - other))
        if apart_m < MIN_APART_M:
            return f"{100 * apart_m:.1f} cm from another point (at least {100 * MIN_APART_M:.0f} cm)"
    if len(flat) < 3:
        return None
    (ax, ay), (bx, by) = flat[1] - flat[0], flat[2] - flat[0]
    sides = [float(np.linalg.norm(a - b)) for a, b in ((flat[0], flat[1]), (flat[1], flat[2]), (flat[2], flat[0]))]
    off_m = abs(float(ax * by - ay * bx)) / max(sides)
    if off_m < MIN_OFF_LINE_M:
        return f"{100 * off_m:.1f} cm off the line of the three (at least {100 * MIN_OFF_LINE_M:.0f} cm)"
    return None


def counter_of(points: Sequence[FloatArray]) -> Counter:
    """The counter under three usable points [3] (``useless`` says None)."""
    a, b, c = (np.asarray(point, dtype=np.float64) for point in points)
    normal = np.cross(b - a, c - a)
    tilt = math.acos(min(abs(float(normal[2])) / float(np.linalg.norm(normal)), 1.0))
    heights = np.array([a[2], b[2], c[2]])
    mean = float(heights.mean())
    return Counter(mean, tilt, float(np.abs(heights - mean).max()))
