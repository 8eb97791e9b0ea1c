"""Episodes as a LeRobot dataset, version 3; files only, lerobot itself is not needed.

    data/chunk-CCC/file-FFF.parquet           one row a frame, one row group an episode, JPEG or PNG bytes as logged
    meta/episodes/chunk-CCC/file-FFF.parquet  one row an episode of the data file with the same numbers
    meta/tasks.parquet, stats.json, info.json
    meta/info.json is written last, so what it counts is there. Layout after lerobot 0.4.4 and 0.6.1.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.lerobot_stats import Stats, image_stats, merged, vector_stats
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import read_json, write_json

VERSION = "v3.0"
CAMERA = "observation.images.front"
PARTS = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
_PATTERN = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_FILES_PER_CHUNK = 1000
_FILE_MB = 100
_VECTOR = pa.list_(pa.float32(), 7)
_FRAME_SCHEMA = pa.schema(
    [
        (CAMERA, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("observation.state", _VECTOR),
        ("action", _VECTOR),
        ("timestamp", pa.float32()),
        *((name, pa.int64()) for name in ("frame_index", "episode_index", "index", "task_index")),
    ]
)


class LeRobotWriter:
    """Append episodes to a dataset folder; a data file appears whole or not at all, and a stopped run resumes."""

    def __init__(self, folder: Path, fps: int, robot_type: str, file_mb: float = _FILE_MB) -> None:
        """Open or create the dataset; `done` holds the keys that are already there.

        Args:
            folder: of the dataset.
            fps: frames a second that timestamps are written for.
            robot_type: name of the robot.
            file_mb: a data file is closed when its pictures reach so many megabytes.

        Raises:
            UsageError: the folder was written with another rate or robot.
            DataError: it holds a dataset that was not written here.
        """
        self._folder, self._fps, self._robot = folder, fps, robot_type
        self._limit_bytes = file_mb * 1e6
        self._pending: list[tuple[pa.Table, dict[str, Any]]] = []
        self._pending_bytes = 0
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, Stats] = {}
        self._shape: list[int] | None = None
        self._files = self._frames = 0
        self.done: set[str] = set()
        if (folder / "meta" / "info.json").exists():
            self._reopen(read_json(folder / "meta" / "info.json"))
        for leftover in folder.rglob("*.partial"):
            leftover.unlink()

    def write(self, episode: Episode) -> None:
        """Queue one episode, and write a data file when enough are queued.

        Raises:
            DataError: its key is there already, its pictures are missing or have another size than the dataset's.
            ImageError: a picture is damaged. After either, the episode is not in the dataset.
        """
        if episode.key in self.done:
            raise DataError(f"episode {episode.key} is in {self._folder} already")
        self._check_pictures(episode)
        stats = {CAMERA: image_stats(episode.images)}
        columns = self._columns(episode)
        stats.update((name, vector_stats(values)) for name, values in columns.items())
        for name, one in stats.items():
            self._stats[name] = merged(self._stats.get(name), one)
        self._pending.append((_table(episode, columns), self._row(episode, stats)))
        self._pending_bytes += sum(map(len, episode.images))
        self._frames += len(episode)
        self.done.add(episode.key)
        if self._pending_bytes >= self._limit_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is queued as one data file, then everything that tells of it."""
        if not self._pending:
            return
        name = _PATTERN.format(**self._place())
        with _whole(self._folder / "data" / name) as partial, pq.ParquetWriter(partial, _FRAME_SCHEMA) as writer:
            for table, _ in self._pending:
                writer.write_table(table, row_group_size=len(table))
        with _whole(self._folder / "meta" / "episodes" / name) as partial:
            pq.write_table(pa.Table.from_pylist([row for _, row in self._pending]), partial)
        self._files += 1
        self._pending, self._pending_bytes = [], 0
        with _whole(self._folder / "meta" / "tasks.parquet") as partial:
            pq.write_table(_tasks_table(self._tasks), partial)
        write_json(self._folder / "meta" / "stats.json", self._stats)
        write_json(self._folder / "meta" / "info.json", self._info())

    def __enter__(self) -> LeRobotWriter:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is queued, also when an error ends the run: whole episodes are worth keeping."""
        self.flush()

    def _reopen(self, info: dict[str, Any]) -> None:
        """Take up where meta/info.json ends; a data file behind that is written again."""
        asked = (self._fps, self._robot)
        if (info.get("fps"), info.get("robot_type")) != asked:
            raise UsageError(
                f"{self._folder} has {info.get('fps')} frames a second of a {info.get('robot_type')}; "
                f"asked for {asked[0]} of a {asked[1]}: choose another --out"
            )
        files = sorted((self._folder / "meta" / "episodes").rglob("*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()][: int(info["total_episodes"])]
        if len(rows) < int(info["total_episodes"]) or any("episode_key" not in row for row in rows):
            raise DataError(f"{self._folder} was not written by export-lerobot, or lacks files; choose another --out")
        for row in rows:
            self.done.add(str(row["episode_key"]))
            self._tasks.setdefault(row["tasks"][0], len(self._tasks))
            for name in _FRAME_SCHEMA.names:
                one = {key.rsplit("/", 1)[1]: row[key] for key in row if key.startswith(f"stats/{name}/")}
                self._stats[name] = merged(self._stats.get(name), one)
        self._files = len({(row["data/chunk_index"], row["data/file_index"]) for row in rows})
        self._frames = int(info["total_frames"])
        self._shape = info["features"][CAMERA]["shape"]

    def _check_pictures(self, episode: Episode) -> None:
        if not episode.images:
            raise DataError(f"episode {episode.key} has no images")
        sizes = {_size(data) for data in episode.images}
        shape = self._shape or [*min(sizes), 3]
        if sizes != {(shape[0], shape[1])}:
            raise DataError(
                f"episode {episode.key} has pictures of {sorted(sizes)} (height, width); "
                f"one LeRobot dataset has one size, here {shape[0]} x {shape[1]}"
            )
        self._shape = shape

    def _columns(self, episode: Episode) -> dict[str, NDArray[np.float64]]:
        """Every column but the pictures, [T, C], as it is stored."""
        steps = np.arange(len(episode), dtype=np.float64)[:, None]
        task = self._tasks.setdefault(episode.instruction, len(self._tasks))
        return {
            "observation.state": _single(episode.states),
            "action": _single(episode.actions),
            "timestamp": _single(steps / self._fps),
            "frame_index": steps,
            "episode_index": np.full_like(steps, len(self.done)),
            "index": steps + self._frames,
            "task_index": np.full_like(steps, task),
        }

    def _place(self) -> dict[str, int]:
        chunk, file = divmod(self._files, _FILES_PER_CHUNK)
        return {"chunk_index": chunk, "file_index": file}

    def _row(self, episode: Episode, stats: dict[str, Stats]) -> dict[str, Any]:
        """The episode's row of meta/episodes; key, source and first step are ours, other readers pass over them."""
        place = self._place()
        return {
            "episode_index": len(self.done),
            "tasks": [episode.instruction],
            "length": len(episode),
            **{f"data/{name}": number for name, number in place.items()},
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + len(episode),
            **{f"meta/episodes/{name}": number for name, number in place.items()},
            "episode_key": episode.key,
            "source": episode.source,
            "first_step": episode.first_step,
            **{f"stats/{name}/{kind}": value for name, one in stats.items() for kind, value in one.items()},
        }

    def _info(self) -> dict[str, Any]:
        vector = {"dtype": "float32", "shape": [7], "names": PARTS}
        single = {"shape": [1], "names": None}
        counts = ("frame_index", "episode_index", "index", "task_index")
        return {
            "codebase_version": VERSION,
            "robot_type": self._robot,
            "total_episodes": len(self.done),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": _FILE_MB,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self.done)}"},
            "data_path": f"data/{_PATTERN}",
            "video_path": None,
            "features": {
                CAMERA: {"dtype": "image", "shape": self._shape, "names": ["height", "width", "channels"]},
                "observation.state": vector,
                "action": vector,
                "timestamp": {"dtype": "float32", **single},
                **{name: {"dtype": "int64", **single} for name in counts},
            },
        }


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def _single(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers as single precision keeps them."""
    return values.astype(np.float32).astype(np.float64)


def _size(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.height, picture.width
    except OSError as error:
        raise DataError(f"a picture of {len(data)} bytes cannot be read: {error}") from error


def _table(episode: Episode, columns: dict[str, NDArray[np.float64]]) -> pa.Table:
    suffix = "png" if episode.images[0].startswith(b"\x89PNG") else "jpg"
    pictures = [{"bytes": data, "path": f"frame-{n:06d}.{suffix}"} for n, data in enumerate(episode.images)]
    arrays = [pa.array(pictures, type=_FRAME_SCHEMA.field(CAMERA).type)]
    for name, values in columns.items():
        kind = _FRAME_SCHEMA.field(name).type
        arrays.append(pa.array(values.tolist(), type=kind) if kind == _VECTOR else pa.array(values[:, 0]).cast(kind))
    return pa.table(arrays, schema=_FRAME_SCHEMA)


def _tasks_table(tasks: dict[str, int]) -> pa.Table:
    """The texts with their numbers, marked so that pandas, with which LeRobot reads them, takes the text as index."""
    column = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    note = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **column},
            {"name": "task", "field_name": "task", **text},
        ],
        "pandas_version": "2.0.0",
    }
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], {"pandas": json.dumps(note)})
    return pa.table([list(tasks.values()), list(tasks)], schema=schema)
