"""RLDS datasets (TensorFlow Datasets on disk) as episodes, without TensorFlow; made for BridgeData V2.

One record is one episode: `steps/action` float[T*7], `steps/observation/state` float[T*7],
`steps/observation/image_0` bytes[T], `steps/language_instruction` bytes[T], `episode_metadata/...`. Source:
https://github.com/google-research/rlds and the features.json that lies beside the shards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm2vla_schema.errors import ImageError
from vlm2vla_schema.images import decode_image
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.intake import IntakeOptions, IntakeReport, RawEpisode, take_in
from vlm2vla_training.episodes.tfexample import Example, Layout
from vlm2vla_training.episodes.tfrecord import Damage, Record, read_records, record_at, shards_of
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_json

_SHARD_NAME = re.compile(r"^(?P<name>.+)-(?P<split>[a-z]+)\.tfrecord-(?P<shard>\d+)-of-(?P<shards>\d+)$")
# Where the Berkeley builders kept their intermediate files; what follows is the same for everyone.
_BUILD_ROOT = re.compile(r"^.*/numpy_\d+/")
_OLD_SUBSET = (
    "this is OXE's `bridge` 0.1.0, an old subset with other actions; expected `bridge_dataset` 1.0.0 of "
    "rail.eecs.berkeley.edu"
)


@dataclass(frozen=True)
class Met:
    """A record as it was met: its place, its episode's key (None: it has none), the episode unless it is left out, and
    what there is to report of it alone.
    """

    number: int
    offset: int
    key: str | None
    episode: Episode | None
    report: IntakeReport


@dataclass
class _Shard:
    """What is the same for every record of a shard, and the layout of the record before."""

    source: str
    split: str | None
    name: str
    layout: Layout = ()
    metadata: tuple[tuple[str, str], ...] = ()  # names of the wanted features, long and short


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
            described = self._describe(shard)
            for record in self._records(shard, self.report.damage):
                episode = self._meet(described, record, self.report, self._seen).episode
                if episode is not None and episode.key not in skip:
                    yield episode

    def meet(self, shard: Path, damage: list[dict[str, Any]]) -> Iterator[Met]:
        """Yield every whole record of a shard, each by itself; what is damaged is appended to `damage`."""
        described = self._describe(shard)
        for record in self._records(shard, damage):
            yield self._meet(described, record, IntakeReport(), set())

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
        """Report a record that was met by itself, in the order of reading; False when its key was met before."""
        if met.key is not None and met.key in self._seen:
            self.report.records += 1
            _leave_out_twin(self.report, met.key, shard.name, met.number, met.offset)
            return False
        if met.key is not None:
            self._seen.add(met.key)
        self.report.add(met.report)
        return True

    def episode_at(self, shard: Path, number: int, offset: int) -> Episode:
        """Read again one episode that was met at this place.

        Raises:
            DataError: it is not there any more.
        """
        met = self._meet(self._describe(shard), record_at(shard, number, offset), IntakeReport(), set())
        if met.episode is None:
            raise DataError(f"{shard} record {number}: the episode that was here is gone; the file has been changed")
        return met.episode

    def _meet(self, shard: _Shard, record: Record, report: IntakeReport, seen: set[str]) -> Met:
        """Make an episode of a record and report it; one whose key is in `seen` is left out, else its key goes in."""
        report.records += 1
        number, offset = record.number, record.offset
        raw: RawEpisode | None = None
        traps: list[str] = []
        try:
            raw = self._raw(shard, record, report, traps)
        except (DataError, ImageError) as error:
            report.leave_out(f"{shard.name} record {number}", "unreadable record", f"offset {offset}: {error}")
        if raw is not None and raw.key in seen:
            _leave_out_twin(report, raw.key, shard.name, number, offset)
            return Met(number, offset, raw.key, None, report)
        for trap in traps:
            report.traps[trap] += 1
        if raw is None:
            return Met(number, offset, None, None, report)
        seen.add(raw.key)
        return Met(number, offset, raw.key, take_in(raw, self._options, report), report)

    def _raw(self, shard: _Shard, record: Record, report: IntakeReport, traps: list[str]) -> RawEpisode | None:
        """What the record holds; None when its camera is missing, which is reported. Traps met are appended."""
        example = Example(record.data, shard.layout)
        if example.layout is not shard.layout:
            shard.layout, shard.metadata = example.layout, _metadata_names(example)
        if "steps/action/world_vector" in example:
            raise DataError(_OLD_SUBSET)
        metadata = _metadata(example, shard.metadata)
        path = _BUILD_ROOT.sub("", metadata.get("file_path", ""))
        # episode_id alone restarts in every file: the pair is unique.
        number = metadata.get("episode_id", record.number)
        key = f"{shard.source}/{path or shard.name}#{number}"
        images = example.bytes_list(f"steps/observation/{self._camera}")
        if self._camera_missing(metadata, images, traps):
            report.leave_out(key, f"no camera {self._camera}")
            return None
        metadata["split"], metadata["camera"] = shard.split, self._camera
        return RawEpisode(
            key,
            _instruction(example, metadata, traps),
            shard.source,
            images,
            example.rows("steps/action", 7),
            example.rows("steps/observation/state", 7),
            0,
            metadata,
        )

    def _camera_missing(self, metadata: dict[str, Any], images: list[bytes], traps: list[str]) -> bool:
        """A missing camera is not absent but black; `has_image_k` says which are there.

        Episodes of Bridge's first version carry false for every camera, those with pictures included: flags that are
        all false say nothing, and the first frame decides.
        """
        flags = [name for name in metadata if name.startswith("has_image_")]
        if any(map(metadata.get, flags)):
            return not metadata.get(f"has_{self._camera}", 1)
        if flags:
            traps.append("camera_flags_all_false")
        # Black frames are all the same bytes: only such are worth decoding.
        return bool(images) and images[0] == images[-1] and not decode_image(images[0]).any()

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


def _leave_out_twin(report: IntakeReport, key: str, shard: str, number: int, offset: int) -> None:
    report.leave_out(key, "key met twice", f"{shard} record {number}, offset {offset}")


def _info(folder: Path) -> dict[str, Any]:
    path = folder / "dataset_info.json"
    info = read_json(path) if path.exists() else {}
    if not isinstance(info, dict):
        raise DataError(f"{path} holds {type(info).__name__}; expected an object")
    if info.get("name") == "bridge" and str(info.get("version", "")).startswith("0.1"):
        raise DataError(f"{folder}: {_OLD_SUBSET}")
    return info


def _instruction(example: Example, metadata: dict[str, Any], traps: list[str]) -> str:
    name = "steps/language_instruction"
    if name not in example or not metadata.get("has_language", 1):
        return ""
    texts = example.bytes_list(name)
    if texts and texts.count(texts[0]) == len(texts):
        return texts[0].decode("utf-8", "replace").strip()
    found = Counter(text.decode("utf-8", "replace").strip() for text in texts)
    if len(found) > 1:
        traps.append("instruction_varies")
    return next((text for text, _ in found.most_common() if text), "")


def _metadata_names(example: Example) -> tuple[tuple[str, str], ...]:
    prefix = "episode_metadata/"
    names = [(name, name.removeprefix(prefix)) for name in example.names() if name.startswith(prefix)]
    return tuple(one for one in names if one[1] in ("file_path", "episode_id") or one[1].startswith("has_"))


def _metadata(example: Example, names: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """episode_metadata as JSON values: texts and whole numbers, one each."""
    values: dict[str, Any] = {}
    for name, short in names:
        if short == "file_path":
            texts = example.bytes_list(name)
            values[short] = texts[0].decode("utf-8", "replace") if texts else ""
        else:
            values[short] = (example.integers(name) or (0,))[0]
    return values
