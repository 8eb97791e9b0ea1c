"""The path of one episode as inline SVG: seen from above, and its height over the steps; one colour a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.annotation.base import AnnotatedStep
from vlm2vla_training.episodes.base import Episode

_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#c51b7d", "#7570b3", "#8c6d1f", "#555555")
_SIDE = 180.0
_MARGIN = 14.0
# Half of what a panel shows at least, so that a still arm does not look like an earthquake.
_LEAST_SPAN_M = 0.04


def step_colour(index: int) -> str:
    """The colour of the step with this index, as CSS."""
    return _COLOURS[index % len(_COLOURS)]


def path_svg(episode: Episode, steps: Sequence[AnnotatedStep]) -> str:
    """Draw the reached positions; a filled dot is a closing of the gripper, a ring an opening, a cross the start."""
    positions = episode.states[:, :3]
    # From above: left is left (+y) and forward (+x) is up.
    above = _scaled(np.stack([-positions[:, 1], -positions[:, 0]], axis=1), keep_aspect=True)
    height = _scaled(np.stack([np.arange(len(positions)), -positions[:, 2]], axis=1), keep_aspect=False)
    panels = [("from above, forward is up", above), ("height over rows", height)]
    drawn = "".join(
        f'<g transform="translate({number * (_SIDE + _MARGIN):g},0)">{_panel(title, points, episode, steps)}</g>'
        for number, (title, points) in enumerate(panels)
    )
    width, total = 2 * _SIDE + _MARGIN, _SIDE + 18
    return f'<svg viewBox="0 0 {width:g} {total:g}" width="{width:g}" height="{total:g}" role="img">{drawn}</svg>'


def _scaled(points: NDArray[np.float64], keep_aspect: bool) -> NDArray[np.float64]:
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.maximum(high - low, [_LEAST_SPAN_M if keep_aspect else 1.0, _LEAST_SPAN_M])
    if keep_aspect:
        span[:] = span.max()
    scaled: NDArray[np.float64] = (points - (low + high) / 2) / span * (_SIDE - 2 * _MARGIN) + _SIDE / 2
    return scaled


def _panel(title: str, points: NDArray[np.float64], episode: Episode, steps: Sequence[AnnotatedStep]) -> str:
    parts = [f'<rect width="{_SIDE:g}" height="{_SIDE:g}" class="panel"/>']
    for index, step in enumerate(steps):
        begin = max(0, step.first - episode.first_step)
        # One point more: the line reaches the next step's first position.
        part = points[begin : step.last - episode.first_step + 2]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in part)
        parts.append(f'<polyline points="{line}" stroke="{step_colour(index)}"/>')
    x, y = points[0]
    parts.append(f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" class="start"/>')
    gripper = episode.actions[:, 6]
    for row in np.flatnonzero(np.diff(gripper)) + 1:
        x, y = points[row]
        kind = "closing" if gripper[row] < gripper[row - 1] else "opening"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind}"/>')
    parts.append(f'<text x="4" y="{_SIDE + 14:g}">{title}</text>')
    return "".join(parts)
