"""Statistics of one episode as LeRobot keeps them, and their sum over episodes: min, max, mean, std, count, quantiles.

Vectors are [C], cameras [3][1][1] in 0..1. Quantiles of a whole dataset are the episodes' means weighted by count, as
LeRobot's own are: an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.images import decode_image

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
# Pictures of one scene are alike: so many of an episode, evenly spread, stand for all.
_PICTURES = 16
Stats = dict[str, Any]


def vector_stats(values: NDArray[np.float64]) -> Stats:
    """Describe [T, C] numbers, component by component."""
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "count": [len(values)],
        **{name: row.tolist() for name, row in zip(QUANTILES, quantiles, strict=True)},
    }


def image_stats(images: Sequence[bytes]) -> Stats:
    """Describe encoded pictures, channel by channel, from up to 16 of them; `count` is how many were looked at.

    Raises:
        ImageError: a picture cannot be decoded.
    """
    places = np.unique(np.linspace(0, len(images) - 1, min(_PICTURES, len(images))).round().astype(int))
    counts = np.zeros((3, 256), dtype=np.int64)
    for place in places:
        rgb = decode_image(images[place])
        counts += np.stack([np.bincount(rgb[..., channel].ravel(), minlength=256) for channel in range(3)])
    described = [_of_levels(channel) for channel in counts]
    per_channel = {name: [[[one[name]]] for one in described] for name in described[0]}
    return {**per_channel, "count": [len(places)]}


def _of_levels(counts: NDArray[np.int64]) -> dict[str, float]:
    """Describe one channel by how often each of its 256 levels occurs."""
    levels = np.arange(256) / 255.0
    total = int(counts.sum())
    mean = float(counts @ levels) / total
    seen = np.flatnonzero(counts)
    below = np.cumsum(counts)
    quantiles = {name: float(levels[np.searchsorted(below, q * total)]) for name, q in QUANTILES.items()}
    return {
        "min": float(levels[seen[0]]),
        "max": float(levels[seen[-1]]),
        "mean": mean,
        "std": float(np.sqrt(counts @ (levels - mean) ** 2 / total)),
        **quantiles,
    }


def merged(one: Stats | None, other: Stats) -> Stats:
    """Describe the data behind two descriptions together; mean and std are exact, quantiles weighted."""
    if one is None:
        return other
    a, b = ({name: np.asarray(value, dtype=np.float64) for name, value in part.items()} for part in (one, other))
    n, m = float(a["count"][0]), float(b["count"][0])

    def weighted(name: str) -> NDArray[np.float64]:
        return np.asarray((a[name] * n + b[name] * m) / (n + m))

    mean = weighted("mean")
    variance = sum((part["std"] ** 2 + (part["mean"] - mean) ** 2) * k for part, k in ((a, n), (b, m))) / (n + m)
    return {
        "min": np.minimum(a["min"], b["min"]).tolist(),
        "max": np.maximum(a["max"], b["max"]).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(n + m)],
        **{name: weighted(name).tolist() for name in QUANTILES},
    }
