"""`export-lerobot`: recordings or an episode dataset -> a LeRobot dataset, version 3."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Protocol

from vlm2vla_schema.errors import ImageError
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.lerobot_writer import VERSION, LeRobotWriter
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.episodes.recordings import RecordingsSource
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.progress import finish, track


class _Source(Protocol):
    def count(self) -> int: ...

    def keys(self) -> list[str]: ...

    def episodes(self, skip: frozenset[str] = frozenset()) -> Iterator[Episode]: ...


def run_export_lerobot(args: argparse.Namespace) -> int:
    """`export-lerobot`: write, and name what was left out."""
    started = time.monotonic()
    if args.fps < 1:
        raise UsageError(f"--fps {args.fps}: expected a whole number above 0")
    source: _Source = RecordingsSource(args.recordings) if args.recordings else EpisodeDataset(args.episodes)
    if args.dry_run:
        print(f"export-lerobot: would write {source.count()} episodes into {args.out}, LeRobot {VERSION}")
        return 0
    left_out: list[dict[str, str]] = []
    with LeRobotWriter(args.out, args.fps, args.robot_type) as writer:
        before = frozenset(writer.done)
        left = source.count() - len(before & set(source.keys()))
        for episode in track(source.episodes(before), left, "export-lerobot"):
            try:
                writer.write(episode)
            except (DataError, ImageError) as error:
                left_out.append({"episode_key": episode.key, "reason": str(error)})
    total = len(writer.done)
    nothing_moved = left - (total - len(before)) - len(left_out)
    summary = {
        "codebase_version": VERSION,
        "fps": args.fps,
        "robot_type": args.robot_type,
        "episodes": total,
        "new": total - len(before),
        "nothing_moved": nothing_moved,
        "left_out": left_out,
    }
    line = f"{total - len(before)} new episodes, {len(before)} kept, {len(left_out) + nothing_moved} left out"
    finish("export-lerobot", args.out, summary, started, line)
    if not total:
        raise DataError(f"no episode qualifies; {args.out / 'summary.json'} says why")
    return 0
