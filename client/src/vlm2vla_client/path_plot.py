"""The end effector's path seen from above, as inline SVG: forward is up, left is left, one colour a subtask."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlm2vla_client.recorder import RecordedEpisode

X_RANGE_M = (0.08, 0.50)
Y_RANGE_M = (-0.25, 0.28)
PIXELS_PER_M = 900.0
MARGIN_PX = 34.0
COLOURS = 6

Point = tuple[float, float]


def _screen(x_m: float, y_m: float) -> Point:
    """Base frame to pixels; points outside the plot are kept on its edge."""
    x = min(max(x_m, X_RANGE_M[0]), X_RANGE_M[1])
    y = min(max(y_m, Y_RANGE_M[0]), Y_RANGE_M[1])
    return (MARGIN_PX + (Y_RANGE_M[1] - y) * PIXELS_PER_M, MARGIN_PX + (X_RANGE_M[1] - x) * PIXELS_PER_M)


def _xy(value: Any) -> Point | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 2:
        return None
    x, y = value[0], value[1]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (x, y)):
        return None
    return (float(x), float(y))


def _runs(episode: RecordedEpisode) -> list[tuple[int, list[Point]]]:
    """Consecutive measured positions with the same subtask; each run begins where the last ended."""
    runs: list[tuple[int, list[Point]]] = []
    for event in episode.events:
        if event.get("event") not in ("step", "substep", "chunk"):
            continue
        point = _xy(event.get("position_m"))
        if point is None:
            continue
        index = event.get("subtask_index")
        subtask = index if isinstance(index, int) else 0
        if not runs or runs[-1][0] != subtask:
            runs.append((subtask, [runs[-1][1][-1]] if runs else []))
        runs[-1][1].append(point)
    return runs


def _grid() -> str:
    parts = []
    for centimetres in range(10, 51, 10):
        (left, y), (right, _) = _screen(centimetres / 100, Y_RANGE_M[1]), _screen(centimetres / 100, Y_RANGE_M[0])
        parts.append(f'<line class="axis" x1="{left:.0f}" y1="{y:.0f}" x2="{right:.0f}" y2="{y:.0f}"/>')
        parts.append(f'<text class="tick" x="{left - 6:.0f}" y="{y + 3:.0f}" text-anchor="end">{centimetres}</text>')
    for centimetres in range(-20, 21, 10):
        (x, top), (_, low) = _screen(X_RANGE_M[1], centimetres / 100), _screen(X_RANGE_M[0], centimetres / 100)
        parts.append(f'<line class="axis" x1="{x:.0f}" y1="{top:.0f}" x2="{x:.0f}" y2="{low:.0f}"/>')
        parts.append(f'<text class="tick" x="{x:.0f}" y="{low + 14:.0f}" text-anchor="middle">{centimetres}</text>')
    return "".join(parts)


def _objects(config: Mapping[str, Any]) -> str:
    parts = []
    for item in config.get("objects") or []:
        if not isinstance(item, Mapping):
            continue
        point = _xy(item.get("position_m"))
        if point is None:
            continue
        x, y = _screen(*point)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="var(--soft)" stroke-dasharray="3 2"/>'
            f'<text class="tick" x="{x + 12:.1f}" y="{y + 4:.1f}">{html.escape(str(item.get("name", "")))}</text>'
        )
    return "".join(parts)


def path_svg(episode: RecordedEpisode) -> str:
    """An ``<svg>`` element; centimetres on both axes. Empty of lines when nothing moved."""
    width = 2 * MARGIN_PX + (Y_RANGE_M[1] - Y_RANGE_M[0]) * PIXELS_PER_M
    height = 2 * MARGIN_PX + (X_RANGE_M[1] - X_RANGE_M[0]) * PIXELS_PER_M
    runs = _runs(episode)
    lines = []
    for subtask, points in runs:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_screen(*point) for point in points))
        colour = f"var(--c{subtask % COLOURS})"
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round" '
            'stroke-linecap="round"/>'
        )
    ends = ""
    if runs:
        for label, point in (("start", runs[0][1][0]), ("end", runs[-1][1][-1])):
            x, y = _screen(*point)
            fill = "var(--card)" if label == "start" else "var(--ink)"
            ends += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="var(--ink)" stroke-width="1.5"/>'
    config = episode.header.get("config")
    objects = _objects(config if isinstance(config, Mapping) else {})
    return (
        f'<svg role="img" aria-label="path of the end effector from above" viewBox="0 0 {width:.0f} {height:.0f}">'
        f"{_grid()}{objects}{''.join(lines)}{ends}</svg>"
    )
