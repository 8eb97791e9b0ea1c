"""Synthetic robot logs: rows as a teleoperator would command them at 5 Hz, with flat grey images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from vlm2vla_training.episodes.base import Episode

Segment = tuple[float, float, float, float, int]


def flat_image(value: int = 128, width: int = 64, height: int = 48) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def episode_of(
    segments: list[Segment], instruction: str, key: str = "fake/0", noise_m: float = 0.0, seed: int = 0
) -> Episode:
    """Each segment is (dx, dy, dz in metres over all its rows, gripper, number of rows)."""
    generator = np.random.default_rng(seed)
    rows = []
    for dx, dy, dz, gripper, count in segments:
        for _ in range(count):
            jitter = generator.normal(0.0, noise_m, 3) if noise_m else np.zeros(3)
            rows.append([dx / count + jitter[0], dy / count + jitter[1], dz / count + jitter[2], 0, 0, 0, gripper])
    actions = np.array(rows, dtype=np.float64).round(4)
    states = np.zeros_like(actions)
    states[1:, :3] = np.cumsum(actions[:-1, :3], axis=0)
    states[:, 6] = 1.0
    images = [flat_image(40 + index % 180) for index in range(len(rows))]
    return Episode(key, instruction, "fake", images, actions, states)


PICK: list[Segment] = [
    (0.12, 0.04, -0.03, 1, 7),
    (0.0, 0.0, -0.06, 1, 4),
    (0.0, 0.0, 0.0, 0, 3),
    (0.0, 0.0, 0.12, 0, 6),
    (0.0, 0.0, 0.0, 0, 1),
]
PLACE: list[Segment] = [
    (0.12, 0.04, -0.03, 1, 7),
    (0.0, 0.0, -0.06, 1, 4),
    (0.0, 0.0, 0.0, 0, 3),
    (0.0, 0.0, 0.12, 0, 6),
    (-0.05, -0.15, 0.0, 0, 7),
    (0.0, 0.0, -0.08, 0, 5),
    (0.0, 0.0, 0.0, 1, 2),
    (0.0, 0.0, 0.08, 1, 4),
]
EGGPLANT_FISH: list[Segment] = [
    *PLACE,
    (0.06, 0.2, 0.0, 1, 8),
    (0.0, 0.0, -0.06, 1, 4),
    (0.0, 0.0, 0.0, 0, 3),
    (0.0, 0.0, 0.1, 0, 5),
]
RETRY: list[Segment] = [
    (0.12, 0.04, -0.03, 1, 7),
    (0.0, 0.0, -0.06, 1, 4),
    (0.0, 0.0, 0.0, 0, 3),
    (0.0, 0.0, 0.05, 1, 4),
    (0.0, 0.03, 0.0, 1, 3),
    (0.0, 0.0, -0.05, 1, 4),
    (0.0, 0.0, 0.0, 0, 3),
    (0.0, 0.0, 0.12, 0, 6),
]


def write_recording(folder: Path, task: str, rows: int, torn: bool = False) -> None:
    """A rollout folder as the client leaves it, reduced to what ingest reads."""
    (folder / "frames").mkdir(parents=True)
    events = [{"seq": 0, "t_s": 0.0, "event": "episode", "task": task}]
    for index in range(rows):
        (folder / "frames" / f"{index:06d}.jpg").write_bytes(flat_image(50 + index))
        action = [0.01 * (index + 1), 0, 0, 0, 0, 0, 1]
        state = [0.3, 0, 0.1, 0, 0, 0, 1]
        events.append({"seq": index + 1, "event": "step", "frame": index, "action": action, "state": state})
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(text + ('{"seq": 99, "ev' if torn else ""))
