"""One folder an episode: everything needed to read, replay and learn from it.

``events.jsonl``   append-only, one JSON object a line, flushed line by line: ``seq``, ``t_s`` (monotonic clock of this
                   process, seconds), ``event`` and the event's own fields. A crash loses at most the last line; a write
                   that fails leaves none of itself behind.
``frames/NNNNNN.jpg``  the pictures, exactly as the policy was shown them; events name them by number.
``limits.json``    the safety limits in force.
``summary.json``   written once, at the end, atomically; absent after a crash.
``episode.gif``, ``view.html``  for people; made from the above.

The disk is never filled: below ``min_free_bytes`` of free space the episode ends with RecordingStoppedError, the arm
held, and what room is left takes its last events and its summary.

Events: ``episode`` (first line: task, config, policy), ``request``, ``subtasks``, ``plan``, ``row``, ``answer`` (with
raw text), ``dropped``, ``correction`` (an operator's words), ``step`` (a row about to move: its frame, the arm's state
[x y z roll pitch yaw gripper] and the action [dx dy dz droll dpitch dyaw gripper]), ``decision``, ``forecast`` (the
twin moved the chunk first), ``substep``, ``chunk``, ``verifier_call`` (one request to a verifier that counts its cost),
``verdict``, ``hold``, ``error`` and ``end``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vlm2vla_client.errors import RecordingError, RecordingStoppedError
from vlm2vla_client.live import LiveView
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.types import Frame

FORMAT = 1
MAX_LINE_BYTES = 4 << 20
MAX_REMEMBERED_FRAMES = 64
MIN_FREE_BYTES = 512 << 20
ROOM_CHECK_S = 0.5
ROOM_CHECK_BYTES = 16 << 20
CLOSING_EVENTS = frozenset({"fault", "hold", "error", "end"})
"""How an episode ends: written for as long as there is any room at all, and never a reason to stop again."""
UNPAIRED = "backslashreplace"  # a lone surrogate in somebody's text becomes its JSON escape instead of an error


def plain(value: Any) -> Any:
    """``value`` as JSON can carry it: arrays become lists, a number that is not finite becomes its name in a string."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return round(value, 9) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes ``value`` so that a reader sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", errors=UNPAIRED) as file:
        json.dump(plain(value), file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def new_episode_folder(parent: Path, task: str) -> Path:
    """A fresh folder ``<utc time>-<task>`` under ``parent``; never one that exists.

    Raises:
        RecordingError: the folder cannot be made.
    """
    slug = re.sub(r"\W+", "_", task.strip().lower()).strip("_")[:40].rstrip("_") or "episode"
    stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}"
    for attempt in range(1000):
        folder = parent / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
        try:
            folder.mkdir(parents=True, exist_ok=False)
        except FileExistsError:
            continue
        except OSError as error:
            raise RecordingError(f"cannot make a recording folder under {parent}: {error}; give --record DIR") from None
        return folder
    raise RecordingError(f"{parent} holds a thousand episodes named {stem}; give another --record DIR")


class Recorder:
    """Writes one episode; safe to call from several threads; never blocks longer than the disk does.

    Args:
        folder: a new one.
        min_free_bytes: free space below which nothing is recorded but the episode's end; 0 never looks.
        free_bytes: how much is free where a folder lies.
        live: is told all that was recorded, and must return at once.

    Attributes:
        keeps_frames: False in recorders that drop pictures, so that nobody takes one in vain.

    Raises:
        RecordingError: the folder cannot be written, or too little is free to begin with.
    """

    keeps_frames = True

    def __init__(
        self,
        folder: Path,
        *,
        min_free_bytes: int = MIN_FREE_BYTES,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
        live: LiveView | None = None,
    ) -> None:
        self.folder = folder
        self._min_free_bytes, self._free_bytes = min_free_bytes, free_bytes
        self._live = live
        self._looked_s = float("-inf")
        self._since_look = 0
        self._full: str | None = None
        self._frames = folder / "frames"
        self._lock = threading.Lock()
        self._seq = 0
        self._frame_count = 0
        self._frame_numbers: dict[str, int] = {}
        try:
            self._frames.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line that does not fit must not wait in a buffer to be written after the next one.
            self._file = (folder / "events.jsonl").open("xb", buffering=0)
        except OSError as error:
            raise RecordingError(f"cannot record into {folder}: {error}; give --record DIR") from None
        if (problem := self._look()) is not None:
            self._file.close()
            (folder / "events.jsonl").unlink()
            self._frames.rmdir()
            raise RecordingError(problem)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one event; ignored once the recorder is closed.

        Raises:
            RecordingStoppedError: it could not be written, or too little room is left to go on. Not for the events of
                an episode's end: one that does not fit is missing.
        """
        with self._lock:
            if self._file.closed:
                return
            line = {"seq": self._seq, "t_s": round(time.monotonic(), 6), "event": kind}
            line.update(plain(fields))
            data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", UNPAIRED) + b"\n"
            problem = self._append(data)
            self._seq += problem is None
            if self._live is not None:
                self._live.event(line)
            problem = problem or self._look()
        if problem is not None and kind not in CLOSING_EVENTS:
            raise RecordingStoppedError(problem)

    def _append(self, data: bytes) -> str | None:
        """One whole line, or nothing of it and why: half a line would spoil the lines after it."""
        whole = self._file.tell()
        self._since_look += len(data)
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(whole)
                self._file.seek(whole)
            return f"the recording in {self.folder} cannot be written: {error.strerror}: make room or give --record"
        return None

    def _look(self) -> str | None:
        """Why nothing more may be recorded, or None. Looks at the disk every half second, or every 16 MB."""
        due = time.monotonic() - self._looked_s >= ROOM_CHECK_S or self._since_look >= ROOM_CHECK_BYTES
        if self._full is None and self._min_free_bytes > 0 and due:
            self._looked_s, self._since_look = time.monotonic(), 0
            try:
                free = self._free_bytes(self.folder)
            except OSError as error:
                return f"the free space of {self.folder} cannot be read: {error.strerror}; give --record DIR"
            if free < self._min_free_bytes:
                least = self._min_free_bytes / 2**20
                self._full = (
                    f"{free / 2**20:.0f} MiB are free in {self.folder}, below the {least:.0f} MiB "
                    "that stay free (min_free_disk_mb in client.toml): make room, or give --record DIR"
                )
        return self._full

    def frame(self, frame: Frame) -> int:
        """Stores a frame as JPEG and returns its number; the same ``frame_id`` is stored once.

        Raises:
            RecordingStoppedError: it could not be written, or too little room is left.
        """
        with self._lock:
            known = self._frame_numbers.get(frame.frame_id)
            if known is not None:
                return known
            number = self._frame_count
            data = encode_jpeg(frame.image)
            self._since_look += len(data)
            problem = self._look() or self._store(self.path_of(number), data)
            if problem is not None:
                raise RecordingStoppedError(problem)
            self._frame_count += 1
            self._frame_numbers[frame.frame_id] = number
            if self._live is not None:
                self._live.picture(data, time.monotonic())
            while len(self._frame_numbers) > MAX_REMEMBERED_FRAMES:
                self._frame_numbers.pop(next(iter(self._frame_numbers)))
            return number

    def _store(self, path: Path, data: bytes) -> str | None:
        """The file, whole or absent, and why it is absent."""
        temporary = path.with_suffix(".part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return f"{path} cannot be written: {error.strerror}; make room, or give --record DIR"
        return None

    def path_of(self, number: int) -> Path:
        """The file of frame ``number``."""
        return self._frames / f"{number:06d}.jpg"

    def limits(self, limits: Any) -> None:
        """Writes ``limits.json``. Raises RecordingStoppedError when it cannot."""
        self._whole("limits.json", limits)
        if self._live is not None:
            self._live.event({"event": "limits", **plain(limits)})

    def summary(self, summary: Any) -> None:
        """Writes ``summary.json`` (atomic: it is whole or absent). Raises RecordingStoppedError when it cannot."""
        self._whole("summary.json", summary)

    def _whole(self, name: str, value: Any) -> None:
        path = self.folder / name
        try:
            write_json_atomic(path, value)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.with_name(name + ".part").unlink(missing_ok=True)
            raise RecordingStoppedError(f"{path} cannot be written: {error.strerror}; make room") from None

    def close(self) -> None:
        """Syncs and closes ``events.jsonl``; may be called twice.

        Raises:
            RecordingStoppedError: the disk did not take what was written.
        """
        with self._lock:
            if self._file.closed:
                return
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise RecordingStoppedError(f"{self.folder} was not kept whole: {error.strerror}") from None
            finally:
                self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def recorder_in(place: Path | Recorder, min_free_bytes: int, live: LiveView | None = None) -> Recorder:
    """A recorder in a folder, or the one that was given."""
    return place if isinstance(place, Recorder) else Recorder(place, min_free_bytes=min_free_bytes, live=live)


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode read back from its folder.

    Attributes:
        header: the first event (task, config, policy); empty when the crash came before it.
        events: every whole line, in order.
        summary: ``summary.json``, or None when the episode never ended.
        truncated: the last line was torn by a crash and left out.
    """

    folder: Path
    header: dict[str, Any]
    events: list[dict[str, Any]]
    summary: dict[str, Any] | None
    limits: dict[str, Any] | None
    truncated: bool
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task as it was given, or "" when unknown."""
        return str(self.header.get("task", ""))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [event for event in self.events if event.get("event") == kind]

    def frame_path(self, number: int) -> Path:
        """The file of frame ``number``."""
        return self.folder / "frames" / f"{number:06d}.jpg"


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecordingError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_episode(folder: Path) -> RecordedEpisode:
    """Reads an episode folder, also one whose writer was killed.

    Raises:
        RecordingError: no ``events.jsonl``, or a line before the last one is damaged.
    """
    path = folder / "events.jsonl"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordingError(f"{folder} is not an episode folder: {error}") from None
    lines = data.split(b"\n")
    torn = lines.pop()  # what follows the last newline: empty, or a line that a crash cut
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or len(line) > MAX_LINE_BYTES:
            raise RecordingError(f"{path}, line {number} is damaged")
        events.append(event)
    header = events[0] if events and events[0].get("event") == "episode" else {}
    return RecordedEpisode(
        folder=folder,
        header=header,
        events=events,
        summary=_read_json(folder / "summary.json"),
        limits=_read_json(folder / "limits.json"),
        truncated=bool(torn),
    )
