"""The episode dataset on disk: Parquet parts with one row a step, and episodes.parquet with one row an episode.

A part holds one row group an episode, so reading streams one episode at a time. Per-episode facts lie in the part's
own metadata as well, hence episodes.parquet, written at the end, can be rebuilt after a crash, and a run resumes behind
the last whole part.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.errors import DataError

_STEP_SCHEMA = pa.schema(
    [
        ("episode_key", pa.string()),
        ("step", pa.int64()),
        ("image", pa.binary()),
        ("action", pa.list_(pa.float64(), 7)),
        ("state", pa.list_(pa.float64(), 7)),
        ("instruction", pa.string()),
        ("source", pa.string()),
    ]
)
EPISODES_A_PART = 16
_FACTS_KEY = b"vlm2vla_episodes"
_EPISODES_FILE = "episodes.parquet"


class EpisodeWriter:
    """Append episodes to a dataset folder; each part appears whole or not at all."""

    def __init__(self, folder: Path, episodes_per_part: int = EPISODES_A_PART) -> None:
        """Open or create the dataset; `done` holds the keys that are already there."""
        self._folder = folder
        self._per_part = episodes_per_part
        self._pending: list[Episode] = []
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.partial"):
            leftover.unlink()
        self.read_again()

    def read_again(self) -> None:
        """Learn which parts are there; others may have written some."""
        self._facts = _facts_of_parts(self._folder)
        self._number = len(list(self._folder.glob("part-*.parquet")))
        self.done: set[str] = {fact["episode_key"] for fact in self._facts}

    def write(self, episode: Episode) -> None:
        """Queue one episode and write a part when enough are queued.

        Raises:
            DataError: the key is in the dataset already, or the episode has no images.
        """
        if episode.key in self.done:
            raise DataError(f"episode {episode.key} is in {self._folder} already")
        if not episode.images:
            raise DataError(f"episode {episode.key} has no images")
        self._pending.append(episode)
        self.done.add(episode.key)
        if len(self._pending) >= self._per_part:
            self.flush()

    def flush(self) -> None:
        """Write what is queued as one part."""
        if not self._pending:
            return
        self._facts += write_part(self._folder, self._number, self._pending)
        self._number += 1
        self._pending = []

    def close(self) -> None:
        """Write what is queued; the dataset is complete afterwards, even when nothing was added."""
        self.flush()
        _write_episodes_file(self._folder, self._facts)

    def __enter__(self) -> EpisodeWriter:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is queued, also when an error ends the run: whole episodes are worth keeping."""
        self.close()


class EpisodeDataset:
    """Read an episode dataset folder; an EpisodeSource."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            DataError: there is no part in it.
        """
        self._folder = folder
        self.parts = sorted(folder.glob("part-*.parquet"))
        if not self.parts:
            raise DataError(f"{folder} holds no part-*.parquet; expected an episode dataset of demos or ingest")
        self._facts = _facts_of_parts(folder)

    def keys(self) -> list[str]:
        """Return every episode key, in reading order."""
        return [fact["episode_key"] for fact in self._facts]

    def count(self) -> int:
        """Return the number of episodes."""
        return len(self._facts)

    def places(self) -> dict[str, str]:
        """Return the name of the part in which every episode lies, by key, in reading order."""
        return {key: part.name for part in self.parts for key in keys_of_part(part)}

    def steps(self) -> dict[str, int]:
        """Return the number of rows of every episode, by key."""
        return {fact["episode_key"]: int(fact["steps"]) for fact in self._facts}

    def sources(self) -> dict[str, int]:
        """Return how many episodes each source gave."""
        return dict(Counter(str(fact["source"]) for fact in self._facts))

    def episodes(self, skip: frozenset[str] = frozenset(), images: bool = True) -> Iterator[Episode]:
        """Yield episodes one at a time; `images=False` leaves the image bytes on disk."""
        for part in self.parts:
            with pq.ParquetFile(part) as file:
                for group, fact in enumerate(_facts_of(file, part)):
                    if fact["episode_key"] not in skip:
                        yield _read_group(file, group, fact, images)


def episodes_of_parts(folder: Path, names: Sequence[str], keys: Collection[str]) -> Iterator[Episode]:
    """Yield the episodes `keys` of some parts of a dataset; no other part is opened."""
    for name in names:
        with pq.ParquetFile(folder / name) as file:
            for group, fact in enumerate(_facts_of(file, folder / name)):
                if fact["episode_key"] in keys:
                    yield _read_group(file, group, fact, images=True)


def write_part(folder: Path, number: int, episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """Write one part, whole or not at all; return what its metadata says of each episode."""
    path = part_path(folder, number)
    facts = [_fact(episode, path.name) for episode in episodes]
    schema = _STEP_SCHEMA.with_metadata({_FACTS_KEY: json.dumps(facts).encode()})
    partial = path.with_name(path.name + ".partial")
    # Image bytes do not compress further.
    with pq.ParquetWriter(partial, schema, compression="none") as writer:
        for episode in episodes:
            writer.write_table(_step_table(episode, schema), row_group_size=max(1, len(episode)))
    os.replace(partial, path)
    return facts


def part_path(folder: Path, number: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{number:05d}.parquet"


def keys_of_part(path: Path) -> list[str]:
    """Return the keys of the episodes in a part, in its order."""
    with pq.ParquetFile(path) as file:
        return [fact["episode_key"] for fact in _facts_of(file, path)]


def _fact(episode: Episode, part: str) -> dict[str, Any]:
    return {
        "episode_key": episode.key,
        "instruction": episode.instruction,
        "source": episode.source,
        "first_step": episode.first_step,
        "steps": len(episode),
        "part": part,
        "facts": episode.facts,
    }


def _step_table(episode: Episode, schema: pa.Schema) -> pa.Table:
    steps = len(episode)
    columns = {
        "episode_key": [episode.key] * steps,
        "step": list(range(episode.first_step, episode.first_step + steps)),
        "image": episode.images,
        "action": pa.FixedSizeListArray.from_arrays(pa.array(episode.actions.ravel()), 7),
        "state": pa.FixedSizeListArray.from_arrays(pa.array(episode.states.ravel()), 7),
        "instruction": [episode.instruction] * steps,
        "source": [episode.source] * steps,
    }
    return pa.table(columns, schema=schema)


def _facts_of(file: pq.ParquetFile, path: Path) -> list[dict[str, Any]]:
    raw = (file.schema_arrow.metadata or {}).get(_FACTS_KEY)
    if raw is None:
        raise DataError(f"{path} lacks the metadata '{_FACTS_KEY.decode()}'; was it written by another program?")
    facts: list[dict[str, Any]] = json.loads(raw)
    if len(facts) != file.metadata.num_row_groups:
        raise DataError(f"{path} has {file.metadata.num_row_groups} row groups for {len(facts)} episodes")
    return facts


def _facts_of_parts(folder: Path) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = []
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            facts += _facts_of(file, path)
    return facts


def _read_group(file: pq.ParquetFile, group: int, fact: dict[str, Any], images: bool) -> Episode:
    columns = ["action", "state", *(["image"] if images else [])]
    table = file.read_row_group(group, columns=columns)
    return Episode(
        key=fact["episode_key"],
        instruction=fact["instruction"],
        source=fact["source"],
        images=table.column("image").to_pylist() if images else [],
        actions=np.asarray(table.column("action").to_pylist(), dtype=np.float64).reshape(-1, 7),
        states=np.asarray(table.column("state").to_pylist(), dtype=np.float64).reshape(-1, 7),
        first_step=fact["first_step"],
        facts=fact["facts"],
    )


def _write_episodes_file(folder: Path, facts: list[dict[str, Any]]) -> None:
    rows = [{**fact, "facts": json.dumps(fact["facts"], ensure_ascii=False)} for fact in facts]
    schema = pa.schema(
        [
            ("episode_key", pa.string()),
            ("instruction", pa.string()),
            ("source", pa.string()),
            ("first_step", pa.int64()),
            ("steps", pa.int64()),
            ("part", pa.string()),
            ("facts", pa.string()),
        ]
    )
    partial = folder / (_EPISODES_FILE + ".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)
    os.replace(partial, folder / _EPISODES_FILE)
