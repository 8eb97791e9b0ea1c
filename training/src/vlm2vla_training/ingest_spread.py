"""`ingest` of RLDS shards by many processes, on this machine or on a Ray cluster; the same bytes as by one.

First every shard is read, and what comes back is small: where each episode lies, its key, what there is to report. The
order of all is then known, so that every part's sixteen episodes are, and the parts are written wherever there is time.
A part that is there already with the episodes that belong into it is not written again.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from vlm2vla_training.episodes.intake import IntakeOptions, LeftOut, Taken
from vlm2vla_training.episodes.parquet import EPISODES_A_PART, keys_of_part, part_path, write_part
from vlm2vla_training.episodes.rlds import Met, RldsSource
from vlm2vla_training.errors import DataError
from vlm2vla_training.progress import track
from vlm2vla_training.spread import Spread


def write_parts(source: RldsSource, root: Path, options: IntakeOptions, out: Path, spread: Spread) -> None:
    """Write every part of the dataset that is not there; `source.report` is complete afterwards.

    Args:
        source: of `root`, not read yet.
        root: the shards, at the same path on every machine.
        options: those of `source`.
        out: the dataset's folder, at the same path on every machine.
        spread: who does the work.

    Raises:
        DataError: `out` has parts that do not belong to this source, or a shard changed while it was read.
    """
    places = _survey(source, root, options, spread)
    parts = [places[begin : begin + EPISODES_A_PART] for begin in range(0, len(places), EPISODES_A_PART)]
    surplus = len(list(out.glob("part-*.parquet"))) - sum(
        part_path(out, number).exists() for number in range(len(parts))
    )
    if surplus:
        raise DataError(f"{out} has {surplus} parts that {root} does not give; choose another --out")
    left = [
        json.dumps({"part": number, "places": part})
        for number, part in enumerate(parts)
        if not _is_there(part_path(out, number), [key for _, _, _, key in part])
    ]
    for _ in track(spread(partial(_write, str(root), options, str(out)), left), len(left), "ingest: parts written"):
        pass


def _survey(source: RldsSource, root: Path, options: IntakeOptions, spread: Spread) -> list[tuple[str, int, int, str]]:
    """Where every episode lies that belongs into the dataset: (shard, record, offset, key), in reading order."""
    source.report_missing_shards()
    places: list[tuple[str, int, int, str]] = []
    shards = [str(shard) for shard in source.shards]
    found = track(spread(partial(_look, str(root), options), shards), len(shards), "ingest: shards read")
    for shard, text in zip(source.shards, found, strict=True):
        told = json.loads(text)
        for one in told["records"]:
            left_out = LeftOut(*one["left_out"]) if one["left_out"] else None
            taken = Taken(None, left_out, tuple(one["traps"]), one["gap_mm"])
            met = Met(one["number"], one["offset"], one["key"], taken)
            if source.admit(shard, met) and one["kept"]:
                places.append((str(shard), met.number, met.offset, str(met.key)))
        source.report.damage += told["damage"]
    return places


def _look(root: str, options: IntakeOptions, shard: str) -> str:
    """Read one shard and tell of its records; runs anywhere."""
    damage: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for met in RldsSource(Path(root), options).meet(Path(shard), damage):
        episode, left_out, traps, gap_mm = met.taken
        told = {"number": met.number, "offset": met.offset, "key": met.key, "kept": episode is not None}
        records.append({**told, "left_out": left_out, "traps": traps, "gap_mm": gap_mm})
    return json.dumps({"records": records, "damage": damage})


def _write(root: str, options: IntakeOptions, out: str, text: str) -> str:
    """Write one part; runs anywhere."""
    todo = json.loads(text)
    source = RldsSource(Path(root), options)
    episodes = source.episodes_at([(Path(shard), number, offset) for shard, number, offset, _ in todo["places"]])
    write_part(Path(out), todo["part"], episodes)
    return str(todo["part"])


def _is_there(path: Path, keys: list[str]) -> bool:
    return path.exists() and keys_of_part(path) == keys
