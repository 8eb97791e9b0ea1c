"""Paths of the end effector drawn on a camera's picture, as inline SVG.

A projection is needed: the twin's camera is known, another one is given as a 3x4 matrix. Without one the paths are
drawn seen from above, beside the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.images import decode_image, encode_jpeg, to_base64
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_json

Rows = Sequence[Sequence[float]]
Projection = NDArray[np.float64]
"""[3, 4]: (x_m, y_m, z_m, 1) of the base frame to (u w, v w, w); u, v are fractions of the picture's width and height,
from its upper left corner; w is positive in front of the camera."""

_WIDTH, _HEIGHT = 320, 240
_SIDE = 160.0
_MARGIN = 12.0
_LEAST_SPAN_M = 0.04


def twin_projection() -> Projection:
    """The twin's camera; needs vlm2vla-training[sim]."""
    from vlm2vla_twin.scene import CAMERA_FOVY_DEG, CAMERA_POSITION_M, CAMERA_XYAXES

    x, y = np.asarray(CAMERA_XYAXES[:3]), np.asarray(CAMERA_XYAXES[3:])
    x = x / np.linalg.norm(x)
    y = y - (y @ x) * x
    axes = np.stack([x, y / np.linalg.norm(y), np.cross(x, y / np.linalg.norm(y))])
    into_camera = np.concatenate([axes, -(axes @ np.asarray(CAMERA_POSITION_M))[:, None]], axis=1)
    half = np.tan(np.deg2rad(CAMERA_FOVY_DEG) / 2)
    # The camera looks along -z; the picture is 4:3 and its v grows downwards.
    onto = np.array([[0.5 / half * 3 / 4, 0.0, -0.5], [0.0, -0.5 / half, -0.5], [0.0, 0.0, -1.0]])
    matrix: Projection = onto @ into_camera
    return matrix


def read_projection(path: Path) -> Projection:
    """Read {"matrix": 3 lists of 4 numbers}, see `Projection`.

    Raises:
        DataError: the file holds something else.
    """
    try:
        matrix = np.asarray(read_json(path)["matrix"], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (3, 4) or not np.isfinite(matrix).all():
        raise DataError(f'{path}: expected {{"matrix": 3 lists of 4 numbers}}, base frame in metres to the picture')
    return matrix


def projected(points_m: NDArray[np.float64], projection: Projection) -> NDArray[np.float64]:
    """Fractions (u, v) [N, 2] of points [N, 3] in metres; not a number for what lies behind the camera."""
    homogeneous = np.concatenate([points_m, np.ones((len(points_m), 1))], axis=1) @ projection.T
    depth = np.where(homogeneous[:, 2:] > 1e-9, homogeneous[:, 2:], np.nan)
    fractions: NDArray[np.float64] = homogeneous[:, :2] / depth
    return fractions


def waypoints(start_m: Sequence[float], rows: Rows) -> NDArray[np.float64]:
    """Positions [N + 1, 3] in metres: where the arm is, then where each row ends."""
    moves = np.asarray([row[:3] for row in rows], dtype=np.float64).reshape(-1, 3)
    positions: NDArray[np.float64] = np.asarray(start_m, dtype=np.float64) + np.cumsum(
        np.concatenate([np.zeros((1, 3)), moves]), axis=0
    )
    return positions


def paths_svg(
    image: bytes, start_m: Sequence[float], paths: Mapping[str, Rows], before: float, projection: Projection | None
) -> str:
    """The picture with one line a path; a filled dot is a closing of the gripper, a ring an opening.

    Args:
        image: encoded frame. start_m: the end effector at its capture, base frame. paths: CSS class -> rows.
        before: the gripper's command before the first row. projection: None draws the paths from above instead.
    """
    picture = f'<image href="{_jpeg_url(image)}" width="{_WIDTH}" height="{_HEIGHT}" preserveAspectRatio="none"/>'
    tracks = {name: waypoints(start_m, rows) for name, rows in paths.items()}
    if projection is not None:
        places = {name: projected(track, projection) * (_WIDTH, _HEIGHT) for name, track in tracks.items()}
        panel, width = "", float(_WIDTH)
    else:
        places = _from_above(tracks)
        width = _WIDTH + _MARGIN + _SIDE
        panel = (
            f'<rect x="{_WIDTH + _MARGIN:g}" y="0" width="{_SIDE:g}" height="{_SIDE:g}" class="panel"/>'
            f'<text x="{_WIDTH + _MARGIN:g}" y="{_SIDE + 14:g}">from above, forward is up</text>'
        )
    lines = "".join(_line(name, places[name], rows, before) for name, rows in paths.items())
    return (
        f'<svg viewBox="0 0 {width:g} {_HEIGHT}" width="{width:g}" height="{_HEIGHT}" role="img">'
        f"{picture}{panel}{lines}</svg>"
    )


def _jpeg_url(image: bytes) -> str:
    return "data:image/jpeg;base64," + to_base64(encode_jpeg(decode_image(image), _WIDTH, _HEIGHT))


def _from_above(tracks: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """All tracks at one scale, in the panel right of the picture."""
    flat = {name: np.stack([-track[:, 1], -track[:, 0]], axis=1) for name, track in tracks.items()}
    everything = np.concatenate(list(flat.values()))
    low, high = everything.min(axis=0), everything.max(axis=0)
    span = max(float((high - low).max()), _LEAST_SPAN_M)
    centre = np.array([_WIDTH + _MARGIN + _SIDE / 2, _SIDE / 2])
    return {name: (track - (low + high) / 2) / span * (_SIDE - 2 * _MARGIN) + centre for name, track in flat.items()}


def _line(name: str, places: NDArray[np.float64], rows: Rows, before: float) -> str:
    seen = places[np.isfinite(places).all(axis=1)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in seen)
    parts = [f'<polyline points="{points}" class="{name}"/>']
    for number, row in enumerate(rows):
        x, y = places[number + 1]
        if row[3] != before and np.isfinite(x + y):
            kind = "closing" if row[3] < before else "opening"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{name} {kind}"/>')
        before = row[3]
    return "".join(parts)


def projection_for(source: str, given: Projection | None) -> Projection | None:
    """The projection given, else the twin's for episodes of the twin, else none."""
    if given is None and source == "twin":
        return twin_projection()
    return given
