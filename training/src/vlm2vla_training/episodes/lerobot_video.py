"""Frames of a LeRobot dataset whose camera is stored as video (extra `video`: PyAV).

One file holds many episodes, one behind the other; meta/episodes says in which file an episode lies and from which
second on. Source: https://huggingface.co/docs/lerobot/lerobot-dataset-v3 .
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from vlm2vla_schema.images import encode_jpeg
from vlm2vla_training.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer

_PATTERN = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
# A frame belongs to a row when their times differ by less than this part of the time between two frames: times in the
# rows are single precision, those of the file are rounded to its own clock.
_TOLERANCE = 0.25


class VideoFrames:
    """Reads one camera's frames episode by episode; one file is open and one picture decoded at a time."""

    def __init__(self, root: Path, info: dict[str, Any], camera: str) -> None:
        """Read where every episode lies.

        Args:
            root: the dataset's folder.
            info: its meta/info.json.
            camera: name of the feature.

        Raises:
            DataError: the description lacks the rate or where the videos lie.
            ModuleNotFoundError: PyAV is not installed.
        """
        import_module("av")  # an extra: that it is missing is said before the first row is read
        self._root, self._camera = root.resolve(), camera
        self._pattern = str(info.get("video_path") or _PATTERN)
        try:
            self._tolerance_s = _TOLERANCE / float(info["fps"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise DataError(f"{root} has fps {info.get('fps')!r}; expected frames a second above 0") from error
        self._places = _places(root, camera)
        self._path: Path | None = None
        self._file: InputContainer | None = None

    def __enter__(self) -> VideoFrames:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()
        self._path = self._file = None

    def frames(self, episode: int, times_s: Sequence[float]) -> list[bytes]:
        """Return the frames of one episode as JPEG, made as the client makes those that a policy sees.

        Args:
            episode: its index in the dataset.
            times_s: seconds from the episode's start, ascending: the rows' timestamps.

        Raises:
            DataError: there is no such episode, file or frame, or the file cannot be decoded.
        """
        import av

        if episode not in self._places:
            raise DataError(f"meta/episodes does not say where the video of {self._camera} lies for episode {episode}")
        chunk, number, begin_s = self._places[episode]
        path = self._file_of(chunk, number)
        try:
            return self._found(path, [begin_s + time_s for time_s in times_s])
        except av.FFmpegError as error:
            raise DataError(f"{path.name} of {self._camera} cannot be decoded: {error}") from error

    def _found(self, path: Path, wanted_s: list[float]) -> list[bytes]:
        container = self._opened(path)
        stream = container.streams.video[0]
        # Lands on the last key frame that is not behind the wanted one.
        container.seek(max(0, round((wanted_s[0] - self._tolerance_s) * 1e6)))
        found: list[bytes] = []
        for frame in container.decode(stream):
            if frame.time is None:
                continue
            apart_s = frame.time - wanted_s[len(found)]
            if apart_s > self._tolerance_s:
                break
            if apart_s >= -self._tolerance_s:
                found.append(encode_jpeg(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)))
            if len(found) == len(wanted_s):
                return found
        raise DataError(f"{path.name} of {self._camera} has no frame at {wanted_s[len(found)]:.3f} s")

    def _opened(self, path: Path) -> InputContainer:
        import av

        if self._file is None or self._path != path:
            if self._file is not None:
                self._file.close()
            self._path, self._file = None, av.open(path)
            self._path = path
        if not self._file.streams.video:
            raise DataError(f"{path.name} of {self._camera} holds no video")
        return self._file

    def _file_of(self, chunk: int, number: int) -> Path:
        try:
            name = self._pattern.format(video_key=self._camera, chunk_index=chunk, file_index=number)
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise DataError(f"video_path {self._pattern!r} is not a pattern like {_PATTERN!r}") from error
        path = (self._root / name).resolve()
        if not path.is_relative_to(self._root) or not path.is_file():
            raise DataError(f"the video {name} is not a file inside the dataset")
        return path


def _places(root: Path, camera: str) -> dict[int, tuple[int, int, float]]:
    """Chunk, file and first second of every episode's video."""
    prefix = f"videos/{camera}/"
    columns = ["episode_index", prefix + "chunk_index", prefix + "file_index", prefix + "from_timestamp"]
    places = {}
    for path in sorted((root / "meta" / "episodes").rglob("*.parquet")):
        lacking = set(columns) - set(pq.read_schema(path).names)
        if lacking:
            raise DataError(f"{path} lacks the columns {sorted(lacking)}; expected where each episode's video lies")
        table = pq.read_table(path, columns=columns)
        for episode, chunk, number, begin_s in zip(*(table[name].to_pylist() for name in columns), strict=True):
            places[int(episode)] = (int(chunk), int(number), float(begin_s))
    return places
