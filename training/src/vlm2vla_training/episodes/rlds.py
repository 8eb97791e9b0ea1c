"""RLDS datasets (TensorFlow Datasets on disk) as episodes, without TensorFlow; made for BridgeData V2.

One record is one episode: `steps/action` float[T*7], `steps/observation/state` float[T*7],
`steps/observation/image_0` bytes[T], `steps/language_instruction` bytes[T], `episode_metadata/...`. Source:
https://github.com/google-research/rlds and the features.json that lies beside the shards.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vlm2vla_schema.errors import ImageError
from vlm2vla_schema.images import decode_image
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.intake import IntakeOptions, IntakeReport, LeftOut, RawEpisode, Taken
from vlm2vla_training.episodes.taking_in import take_in_all
from vlm2vla_training.episodes.tfexample import Example, Layout
from vlm2vla_training.episodes.tfrecord import Damage, Record, read_records, record_at, shards_of
from vlm2vla_training.episodes.wire import message
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_json

_SHARD_NAME = re.compile(r"^(?P<name>.+)-(?P<split>[a-z]+)\.tfrecord-(?P<shard>\d+)-of-(?P<shards>\d+)$")
# Where the Berkeley builders kept their intermediate files; what follows is the same for everyone.
_BUILD_ROOT = re.compile(r"^.*/numpy_\d+/")
_PREFIX = "episode_metadata/"
_EPISODE_ID, _FILE_PATH, _HAS = (f"{_PREFIX}{name}" for name in ("episode_id", "file_path", "has_"))
_INSTRUCTION = "steps/language_instruction"
_OLD_ACTION = "steps/action/world_vector"
_OLD_SUBSET = (
    "this is OXE's `bridge` 0.1.0, an old subset with other actions; expected `bridge_dataset` 1.0.0 of "
    "rail.eecs.berkeley.edu"
)
# Episodes are taken in together up to so many, or so many bytes of records.
_AT_ONCE = 64
_BYTES_AT_ONCE = 8 << 20


class Met(NamedTuple):
    """A record as it was met: its place, its episode's key (None: it has none), and what became of it."""

    number: int
    offset: int
    key: str | None
    taken: Taken


_Read = tuple[int, int, RawEpisode | Taken]  # number and offset of a record, and what was in it


class _Flags(NamedTuple):
    """What the flags in the metadata of an episode say.

    Attributes:
        values: by name.
        camera: whether the camera is there; None when they do not say.
        all_false: those of all cameras are false, and there are some.
        has_language: whether there is an instruction.
    """

    values: dict[str, int]
    camera: bool | None
    all_false: bool
    has_language: bool


@dataclass
class _Shard:
    """What is the same for every record of a shard, and the layout of the record before."""

    source: str
    split: str | None
    name: str
    layout: Layout | None = None
    flags: tuple[str, ...] = ()  # names of those of its metadata


class RldsSource:
    """Every episode of the TFRecord shards below a folder; an EpisodeSource. `report` fills while reading."""

    def __init__(self, root: Path, options: IntakeOptions) -> None:
        """List the shards.

        Raises:
            DataError: there is none, or it is OXE's old subset of Bridge.
        """
        self.report = IntakeReport()
        self._options = options
        self._camera = options.camera or "image_0"
        self._pictures = f"steps/observation/{self._camera}"
        self.shards = shards_of(root)
        if not self.shards:
            raise DataError(f"{root} holds no *.tfrecord* file; expected an RLDS dataset, shards and dataset_info.json")
        self._infos = {folder: _info(folder) for folder in {shard.parent for shard in self.shards}}
        self._seen: set[str] = set()
        self._described: dict[Path, _Shard] = {}

    def count(self) -> int:
        """Return how many episodes dataset_info.json promises; 0 when it says nothing."""
        return sum(self._promised(shard) or 0 for shard in self.shards)

    def episodes(self, skip: frozenset[str] = frozenset()) -> Iterator[Episode]:
        """Yield the episodes whose key is not in `skip`, one at a time; damage is reported, not raised."""
        self.report_missing_shards()
        for shard in self.shards:
            for met in self.meet(shard, self.report.damage):
                episode = met.taken.episode
                if self.admit(shard, met) and episode is not None and episode.key not in skip:
                    yield episode

    def meet(self, shard: Path, damage: list[dict[str, Any]]) -> Iterator[Met]:
        """Yield every whole record of a shard, each by itself; what is damaged is appended to `damage`."""
        described = self._describe(shard)
        read: list[_Read] = []
        size = 0
        for record in self._records(shard, damage):
            read.append((record.number, record.offset, self._read(described, record)))
            size += len(record.data)
            if len(read) == _AT_ONCE or size >= _BYTES_AT_ONCE:
                yield from self._take_in(read)
                read, size = [], 0
        yield from self._take_in(read)

    def _take_in(self, read: list[_Read]) -> Iterator[Met]:
        """Yield what became of several records; an episode that was yielded is not kept."""
        taken = deque(take_in_all([raw for _, _, raw in read if isinstance(raw, RawEpisode)], self._options))
        for number, offset, found in read:
            if isinstance(found, RawEpisode):
                yield Met(number, offset, found.key, taken.popleft())
            else:
                yield Met(number, offset, None, found)

    def _records(self, shard: Path, damage: list[dict[str, Any]]) -> Iterator[Record]:
        count = 0
        found: list[Damage] = []
        for record in read_records(shard, found.append):
            count += 1
            yield record
        promised = self._promised(shard)
        if promised is not None and count != promised and not found:
            what = f"{count} records; dataset_info.json promises {promised}"
            found.append(Damage(str(shard), count, shard.stat().st_size, what))
        damage += map(asdict, found)

    def admit(self, shard: Path, met: Met) -> bool:
        """Report a record in the order of reading; False when its key was met before."""
        self.report.records += 1
        if met.key is not None and met.key in self._seen:
            self.report.leave_out(met.key, "key met twice", f"{shard.name} record {met.number}, offset {met.offset}")
            return False
        if met.key is not None:
            self._seen.add(met.key)
        self.report.add(met.taken)
        return True

    def episodes_at(self, places: Sequence[tuple[Path, int, int]]) -> list[Episode]:
        """Read again the episodes that were met at these places: shard, number and offset.

        Raises:
            DataError: one is not there any more.
        """
        read: list[_Read] = [
            (number, offset, self._read(self._describe(shard), record_at(shard, number, offset)))
            for shard, number, offset in places
        ]
        episodes = [met.taken.episode for met in self._take_in(read)]
        there = [episode for episode in episodes if episode is not None]
        if len(there) < len(episodes):
            shard, number, _ = places[episodes.index(None)]
            raise DataError(f"{shard} record {number}: the episode that was here is gone; the file has been changed")
        return there

    def _read(self, shard: _Shard, record: Record) -> RawEpisode | Taken:
        """What the record holds; why it is left out if there is no episode in it."""
        traps: list[str] = []
        try:
            return self._raw(shard, record, traps)
        except (DataError, ImageError) as error:
            place = f"{shard.name} record {record.number}"
            return Taken(None, LeftOut(place, "unreadable record", f"offset {record.offset}: {error}"), tuple(traps))

    def _raw(self, shard: _Shard, record: Record, traps: list[str]) -> RawEpisode | Taken:
        """The episode of a record, or that its camera is missing; the traps met are appended."""
        example = Example(record.data, shard.layout)
        if example.layout is None or example.layout is not shard.layout:
            shard.layout = example.layout
            shard.flags = tuple(name for name in example.names() if name.startswith(_HAS))
        if _OLD_ACTION in example:
            raise DataError(_OLD_SUBSET)
        flags = _flags(example.entries(shard.flags), shard.flags, self._camera)
        facts: dict[str, Any] = {}
        if _EPISODE_ID in example:
            facts["episode_id"] = (example.integers(_EPISODE_ID) or (0,))[0]
        path = shard.name
        if _FILE_PATH in example:
            texts = example.bytes_list(_FILE_PATH)
            facts["file_path"] = texts[0].decode("utf-8", "replace") if texts else ""
            path = _BUILD_ROOT.sub("", facts["file_path"]) or path
        facts.update(flags.values)
        # episode_id alone restarts in every file: the pair is unique.
        key = f"{shard.source}/{path}#{facts.get('episode_id', record.number)}"
        images = example.bytes_list(self._pictures)
        if flags.all_false:
            traps.append("camera_flags_all_false")
        if flags.camera is False or (flags.camera is None and _black(images)):
            return Taken(None, LeftOut(key, f"no camera {self._camera}"), tuple(traps))
        facts["split"], facts["camera"] = shard.split, self._camera
        instruction = _instruction(example, flags.has_language, traps)
        actions, states = example.rows("steps/action", 7), example.rows("steps/observation/state", 7)
        return RawEpisode(key, instruction, shard.source, images, actions, states, 0, facts, tuple(traps))

    def _describe(self, shard: Path) -> _Shard:
        described = self._described.get(shard)
        if described is None:
            match = _SHARD_NAME.match(shard.name)
            name = str(self._infos[shard.parent].get("name", "")) or (match["name"] if match else "rlds")
            source = "bridge" if name == "bridge_dataset" else name
            described = self._described[shard] = _Shard(source, match["split"] if match else None, shard.name)
        return described

    def _promised(self, shard: Path) -> int | None:
        match = _SHARD_NAME.match(shard.name)
        for split in self._infos[shard.parent].get("splits", []) if match else ():
            lengths = split.get("shardLengths", [])
            if match and split.get("name") == match["split"] and len(lengths) == int(match["shards"]):
                return int(lengths[int(match["shard"])])
        return None

    def report_missing_shards(self) -> None:
        """Report which of the shards that the names promise are not there."""
        found: dict[tuple[Path, str, str, int], set[int]] = {}
        for shard in self.shards:
            if match := _SHARD_NAME.match(shard.name):
                group = (shard.parent, match["name"], match["split"], int(match["shards"]))
                found.setdefault(group, set()).add(int(match["shard"]))
        for (_, name, split, shards), present in found.items():
            missing = shards - len(present)
            if missing:
                self.report.traps[f"shards_missing of {name}-{split}"] += missing


def _info(folder: Path) -> dict[str, Any]:
    path = folder / "dataset_info.json"
    info = read_json(path) if path.exists() else {}
    if not isinstance(info, dict):
        raise DataError(f"{path} holds {type(info).__name__}; expected an object")
    if info.get("name") == "bridge" and str(info.get("version", "")).startswith("0.1"):
        raise DataError(f"{folder}: {_OLD_SUBSET}")
    return info


def _instruction(example: Example, has_language: bool, traps: list[str]) -> str:
    if not has_language or _INSTRUCTION not in example:
        return ""
    text, varies = _commonest(example.entries((_INSTRUCTION,)))
    if varies:
        traps.append("instruction_varies")
    return text


@lru_cache(maxsize=1024)
def _commonest(entry: bytes) -> tuple[str, bool]:
    """The instruction of an episode from its entry in the record, and whether it varies; episodes share a few."""
    texts = Example(message(1, entry)).bytes_list(_INSTRUCTION)
    found = Counter(text.decode("utf-8", "replace").strip() for text in texts)
    return next((text for text, _ in found.most_common() if text), ""), len(found) > 1


def _black(images: list[bytes]) -> bool:
    """A missing camera is not absent but black: all such frames are the same bytes, only they are worth decoding."""
    return bool(images) and images[0] == images[-1] and not decode_image(images[0]).any()


@lru_cache(maxsize=1024)
def _flags(entries: bytes, names: tuple[str, ...], camera: str) -> _Flags:
    """Read the flags from their entries in the record, which are the same in most.

    Episodes of Bridge's first version carry false for every camera, those with pictures included: flags that are all
    false say nothing, and the first frame decides.
    """
    example = Example(message(1, entries))
    values = {name.removeprefix(_PREFIX): (example.integers(name) or (0,))[0] for name in names}
    cameras = [value for name, value in values.items() if name.startswith("has_image_")]
    there = bool(values.get(f"has_{camera}", 1)) if any(cameras) else None
    return _Flags(values, there, bool(cameras) and not any(cameras), bool(values.get("has_language", 1)))
