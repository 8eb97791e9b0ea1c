"""LeRobot datasets, version 3, as episodes; files only, lerobot itself is not needed. Frames are stored as images or as
video (`lerobot_video`).

Layout: meta/info.json, meta/tasks.parquet (texts by task_index), data/chunk-000/file-000.parquet with one row a frame,
many episodes a file. Source: https://huggingface.co/docs/lerobot/lerobot-dataset-v3 .
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.intake import IntakeOptions, IntakeReport, RawEpisode, rows_of
from vlm2vla_training.episodes.lerobot_video import VideoFrames
from vlm2vla_training.episodes.taking_in import take_in
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_json

_ACTION, _STATE = "action", "observation.state"
_BATCH_ROWS = 64
_AXES = ("x", "y", "z")


class LeRobotSource:
    """Every episode of one dataset folder; an EpisodeSource. `report` fills while reading."""

    def __init__(self, root: Path, options: IntakeOptions) -> None:
        """Read the description of the dataset.

        Raises:
            DataError: another version, or actions that are not end-effector motions.
            ModuleNotFoundError: the camera's frames are stored as video and PyAV is not installed (extra `video`).
        """
        self.report = IntakeReport()
        self._root = root
        self._options = options
        info = read_json(root / "meta" / "info.json")
        version = str(info.get("codebase_version", "")) if isinstance(info, dict) else ""
        if not version.startswith("v3"):
            raise DataError(f"{root} has codebase_version {version!r}; expected v3.x (lerobot converts older ones)")
        self._info: dict[str, Any] = info
        features = info.get("features", {})
        self._camera, stored = _camera(features, options.camera)
        self._video = VideoFrames(root, info, self._camera) if stored == "video" else None
        _check_motion(features)
        self._state_columns = _state_columns(features)
        self._name = str(info.get("robot_type") or "lerobot")
        self._tasks = _tasks(root / "meta" / "tasks.parquet")

    def count(self) -> int:
        """Return how many episodes info.json promises."""
        return int(self._info.get("total_episodes", 0))

    def episodes(self, skip: frozenset[str] = frozenset()) -> Iterator[Episode]:
        """Yield the episodes whose key is not in `skip`, one in memory at a time."""
        with self._video or nullcontext():
            for number, rows in self._rows_by_episode():
                self.report.records += 1
                key = f"lerobot/{self._root.name}/{number}"
                try:
                    raw = self._raw(key, number, rows)
                except DataError as error:
                    self.report.leave_out(key, "unreadable episode", str(error))
                    continue
                episode = take_in(raw, self._options, self.report)
                if episode is not None and episode.key not in skip:
                    yield episode
        missing = self.count() - self.report.records
        if missing > 0:
            self.report.traps["episodes_missing"] += missing

    def _rows_by_episode(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        shown = "timestamp" if self._video else self._camera
        columns = [shown, _ACTION, _STATE, "episode_index", "frame_index", "task_index"]
        rows: list[dict[str, Any]] = []
        for path in sorted((self._root / "data").rglob("*.parquet")):
            with pq.ParquetFile(path) as file:
                lacking = [name for name in columns if name not in file.schema_arrow.names]
                if lacking:
                    raise DataError(f"{path} lacks the columns {lacking}; expected one row a frame")
                for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        if rows and row["episode_index"] != rows[0]["episode_index"]:
                            yield int(rows[0]["episode_index"]), rows
                            rows = []
                        rows.append(row)
        if rows:
            yield int(rows[0]["episode_index"]), rows

    def _raw(self, key: str, number: int, rows: list[dict[str, Any]]) -> RawEpisode:
        numbers = [int(row["frame_index"]) for row in rows]
        if numbers != list(range(numbers[0], numbers[0] + len(rows))):
            raise DataError(f"frame numbers {numbers[:5]}... have gaps; expected one row a frame, in order")
        tasks = {int(row["task_index"]) for row in rows}
        if len(tasks) > 1:
            self.report.traps["instruction_varies"] += 1
        states = np.asarray([row[_STATE] for row in rows], dtype=np.float64)[:, self._state_columns]
        actions = rows_of([row[_ACTION] for row in rows], 7, _ACTION)
        words = self._tasks.get(int(rows[0]["task_index"]), "")
        facts = {"camera": self._camera, "robot_type": self._name, "fps": self._info.get("fps")}
        images = self._images(number, rows)
        return RawEpisode(key, words, "lerobot", images, actions, states, numbers[0], facts)

    def _images(self, number: int, rows: list[dict[str, Any]]) -> list[bytes]:
        if self._video is None:
            return [self._image(row[self._camera]) for row in rows]
        return self._video.frames(number, [float(row["timestamp"]) for row in rows])

    def _image(self, value: Any) -> bytes:
        """Bytes are in the row, or in a file beside the dataset that the row names."""
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return bytes(value["bytes"])
        name = value.get("path") if isinstance(value, dict) else None
        path = (self._root / str(name)).resolve()
        if not name or not path.is_relative_to(self._root.resolve()) or not path.is_file():
            raise DataError(f"a frame of {self._camera} has neither bytes nor a file inside the dataset ({name})")
        return path.read_bytes()


def _camera(features: dict[str, Any], wanted: str | None) -> tuple[str, str]:
    """The camera asked for, or the first by name; and whether its frames are stored as "image" or "video"."""
    cameras = {name: one.get("dtype") for name, one in features.items() if one.get("dtype") in ("image", "video")}
    name = wanted or next(iter(sorted(cameras)), None)
    if name not in cameras:
        raise DataError(f"camera {wanted!r} is not in the dataset; it has {sorted(cameras)}")
    return str(name), str(cameras[name])


def _names(feature: dict[str, Any]) -> list[str]:
    """Names of a vector's parts; they come as a list, or as a dict that holds one."""
    names = feature.get("names") or []
    if isinstance(names, dict):
        names = next((one for one in names.values() if isinstance(one, list)), [])
    return [str(name).lower() for name in names]


def _check_motion(features: dict[str, Any]) -> None:
    feature = features.get(_ACTION, {})
    names, shape = _names(feature), feature.get("shape")
    spatial = len(names) == 7 and all(axis in name.split("_") for axis, name in zip(_AXES, names, strict=False))
    if shape is None or list(shape) != [7] or not spatial:
        raise DataError(
            f"'{_ACTION}' has shape {shape} and names {names}; expected 7 values: x, y, z, roll, pitch, yaw as motions "
            "of the end effector in metres and radians, gripper 1 open, named so: seven joints have that shape too. "
            "Joint commands cannot be put into words"
        )


def _state_columns(features: dict[str, Any]) -> NDArray[np.int64]:
    """Which parts of the state are the pose and the gripper; eight values carry a padding before the gripper."""
    feature = features.get(_STATE, {})
    shape, names = list(feature.get("shape") or []), _names(feature)
    if shape == [7]:
        return np.arange(7)
    if shape == [8]:
        pad = next((place for place, name in enumerate(names) if "pad" in name), 6)
        return np.array([place for place in range(8) if place != pad])
    raise DataError(f"'{_STATE}' has shape {shape}; expected 7 values (pose and gripper), or 8 with a padding")


def _tasks(path: Path) -> dict[int, str]:
    if not path.exists():
        raise DataError(f"{path} is missing; expected the texts of the tasks")
    rows = pq.read_table(path).to_pylist()
    # The text is the table's index, which Parquet keeps as a column of its own.
    return {int(row["task_index"]): str(row.get("task", row.get("__index_level_0__", "")) or "") for row in rows}
