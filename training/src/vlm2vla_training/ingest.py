"""`ingest`: robot logs of any format -> an episode dataset. Resumes behind the last whole part."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from vlm2vla_training.episodes.base import EpisodeSource
from vlm2vla_training.episodes.bridge_raw import BridgeRawSource
from vlm2vla_training.episodes.intake import IntakeOptions, IntakeReport
from vlm2vla_training.episodes.lerobot import LeRobotSource
from vlm2vla_training.episodes.parquet import EpisodeDataset, EpisodeWriter
from vlm2vla_training.episodes.recordings import RecordingsSource
from vlm2vla_training.episodes.rlds import RldsSource
from vlm2vla_training.episodes.tfrecord import shards_of
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.ingest_spread import write_parts
from vlm2vla_training.jsonio import read_json, write_json
from vlm2vla_training.progress import finish, track
from vlm2vla_training.spread import Spread, chosen_spread, over_processes

_OPTIONS_FILE = "options.json"
# So many damaged places are printed; summary.json has all.
_PRINTED = 20
# Less is read before the processes have started.
_SPREAD_FROM_BYTES = 256_000_000


def run_ingest(args: argparse.Namespace) -> int:
    """`ingest`: read, write, report what was left out and why."""
    started = time.monotonic()
    spread = _spread(args)
    if args.format == "twin":
        return _pass_through(args.input, args.out, args.dry_run, started)
    source, report = _open(args)
    if args.dry_run:
        expected = source.count() or "an unknown number of"
        print(f"ingest: would read {expected} episodes from {args.input} into {args.out}")
        return 0
    _same_options(args)
    with EpisodeWriter(args.out) as writer:
        before = len(writer.done)
        if spread is None:
            for episode in track(source.episodes(frozenset(writer.done)), source.count() - before, "ingest"):
                writer.write(episode)
        elif isinstance(source, RldsSource):
            write_parts(source, args.input, _intake(args), args.out, spread)
            writer.read_again()
        total = len(writer.done)
    if report is None:
        details: dict[str, Any] = {"left_out": source.count() - total}
        left_out = details["left_out"]
    else:
        details, left_out = report.to_json(), report.left_out.total()
        _say_damage(report)
    summary = {"format": args.format, "episodes": total, "new": total - before, **details}
    line = f"{total - before} new episodes, {before} kept, {left_out} left out"
    if report is not None and report.damage:
        line += f", {len(report.damage)} damaged places"
    finish("ingest", args.out, summary, started, line)
    if not total:
        raise DataError(f"no episode of {args.input} qualifies; {args.out / 'summary.json'} says why")
    return 0


def _intake(args: argparse.Namespace) -> IntakeOptions:
    return IntakeOptions(args.keep_unlabelled, args.actions, args.camera)


def _spread(args: argparse.Namespace) -> Spread | None:
    """Who else does the work; None when nobody does.

    Raises:
        UsageError: this cannot be spread.
    """
    if args.format != "rlds":
        if (args.workers or 1) > 1 or args.ray:
            raise UsageError("--workers and --ray are for rlds; other formats are read by one process")
    elif args.workers is None and args.ray is None:
        size = sum(shard.stat().st_size for shard in shards_of(args.input))
        cores = len(os.sched_getaffinity(0))
        return over_processes(cores) if size >= _SPREAD_FROM_BYTES and cores > 1 else None
    return chosen_spread(args)


def _open(args: argparse.Namespace) -> tuple[EpisodeSource, IntakeReport | None]:
    options = _intake(args)
    if args.format == "rlds":
        rlds = RldsSource(args.input, options)
        return rlds, rlds.report
    if args.format == "raw":
        raw = BridgeRawSource(args.input, options)
        return raw, raw.report
    if args.format == "lerobot":
        lerobot = LeRobotSource(args.input, options)
        return lerobot, lerobot.report
    if options != IntakeOptions():
        raise UsageError("--keep-unlabelled, --actions and --camera are for rlds, raw and lerobot, not for recordings")
    return RecordingsSource(args.input, args.successful_only), None


def _same_options(args: argparse.Namespace) -> None:
    """A resumed run must read what the first one read.

    Raises:
        UsageError: the folder was written with other options.
    """
    names = ("format", "successful_only", "keep_unlabelled", "actions", "camera")
    chosen = {name: getattr(args, name) for name in names}
    path = args.out / _OPTIONS_FILE
    if path.exists() and read_json(path) != chosen:
        raise UsageError(f"{args.out} was ingested with other options ({path}); choose another --out")
    write_json(path, chosen)


def _say_damage(report: IntakeReport) -> None:
    for damage in report.damage[:_PRINTED]:
        print(
            f"ingest: damaged: {damage['file']} record {damage['record']} at byte {damage['offset']}: {damage['what']}",
            file=sys.stderr,
        )
    if len(report.damage) > _PRINTED:
        print(f"ingest: {len(report.damage) - _PRINTED} more damaged places in summary.json", file=sys.stderr)


def _pass_through(source: Path, out: Path, dry_run: bool, started: float) -> int:
    dataset = EpisodeDataset(source)
    if dry_run:
        print(f"ingest: would copy {dataset.count()} twin episodes from {source} to {out}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for path in [*dataset.parts, source / "episodes.parquet"]:
        partial = out / (path.name + ".partial")
        shutil.copyfile(path, partial)
        partial.replace(out / path.name)
    episodes = dataset.count()
    finish("ingest", out, {"format": "twin", "episodes": episodes}, started, f"{episodes} episodes passed through")
    return 0
