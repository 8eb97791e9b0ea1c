"""Rollout recordings of the client, read back as episodes. Files only: the client package is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vla_training.episodes.base import Episode, binary_gripper
from vlm2vla_training.episodes.corrections import CorrectionReader
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_json, read_jsonl

_EVENTS_FILE = "events.jsonl"


class RecordingsSource:
    """Every recording below a folder (or the folder itself) as an EpisodeSource.

    One executed row is one step: its frame, the arm's state before it and the commanded 7-D action. What an operator
    wrote at `--confirm` goes into the episode's facts, as `corrections`.
    """

    def __init__(self, root: Path, successful_only: bool = False) -> None:
        """List the recordings below `root`.

        Raises:
            DataError: there is none.
        """
        self._root = root
        self._successful_only = successful_only
        self._folders = sorted(path.parent for path in root.rglob(_EVENTS_FILE))
        if not self._folders:
            raise DataError(f"{root} holds no {_EVENTS_FILE}; expected rollout recordings of vlm2vla-client run")

    def keys(self) -> list[str]:
        """Return "recordings/<folder>" of every recording."""
        return [self._key(folder) for folder in self._folders]

    def count(self) -> int:
        """Return how many recordings there are, whether they qualify or not."""
        return len(self._folders)

    def episodes(self, skip: frozenset[str] = frozenset()) -> Iterator[Episode]:
        """Yield the recordings that hold at least one executed row; each is read whole."""
        for folder in self._folders:
            key = self._key(folder)
            if key in skip:
                continue
            facts = _facts(folder)
            if self._successful_only and not facts["success"]:
                continue
            episode = read_recording(folder, key, facts)
            if episode is not None:
                yield episode

    def _key(self, folder: Path) -> str:
        relative = folder.relative_to(self._root)
        return f"recordings/{folder.name if relative == Path('.') else relative.as_posix()}"


def read_recording(folder: Path, key: str, facts: dict[str, Any]) -> Episode | None:
    """Read one recording; None when nothing moved.

    Raises:
        DataError: a step event lacks its frame, state or action, a correction its words, or a frame's file is missing.
    """
    instruction = ""
    images: list[bytes] = []
    actions: list[list[float]] = []
    states: list[list[float]] = []
    corrections = CorrectionReader()
    for event in read_jsonl(folder / _EVENTS_FILE):
        corrections.event(event)
        kind = event.get("event")
        if kind == "episode":
            instruction = str(event.get("task", ""))
        if kind != "step":
            continue
        image, action, state = _step(folder, event)
        images.append(image)
        actions.append(action)
        states.append(state)
    if not actions:
        return None
    corrections.close()
    if corrections.found:
        facts = {**facts, "corrections": corrections.found}
    moves = np.asarray(actions, dtype=np.float64)
    moves[:, 6] = binary_gripper(moves[:, 6])
    return Episode(key, instruction, "recordings", images, moves, np.asarray(states, dtype=np.float64), 0, facts)


def _step(folder: Path, event: dict[str, Any]) -> tuple[bytes, list[float], list[float]]:
    place = f"{folder / _EVENTS_FILE} event {event.get('seq')}"
    values: list[list[float]] = []
    for name in ("action", "state"):
        vector = event.get(name)
        if not isinstance(vector, list) or len(vector) != 7:
            raise DataError(f"{place}: '{name}' is {vector!r}; expected 7 numbers")
        values.append([float(number) for number in vector])
    frame = event.get("frame")
    if not isinstance(frame, int):
        raise DataError(f"{place}: 'frame' is {frame!r}; expected the number of a frame")
    path = folder / "frames" / f"{frame:06d}.jpg"
    try:
        return path.read_bytes(), values[0], values[1]
    except OSError as error:
        raise DataError(f"{place}: {path} cannot be read: {error.strerror}") from error


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    summary = read_json(path) if path.exists() else {}
    success = summary.get("success", summary.get("exit_code") == 0) if isinstance(summary, dict) else False
    return {"folder": folder.name, "success": bool(success), "finished": path.exists()}
