"""The data commands behind ingest: annotate and curate. Each resumes where it stopped and ends with summary.json."""

from __future__ import annotations

import argparse
import time

from vlm2vla_training.annotation.base import Annotator
from vlm2vla_training.annotation.corrections import CorrectionsAnnotator, OnAnnotated, on_annotator
from vlm2vla_training.annotation.files import ANNOTATED_FILE, describe, read_annotated, what_became_of_corrections
from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.curation.dataset import CurateCounts, ExampleWriter, count, curate, write_card
from vlm2vla_training.curation.decisions import choose, read_decisions
from vlm2vla_training.curation.examples import ExampleOptions, examples_of
from vlm2vla_training.curation.spread_parts import curate_parts
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import TrainingError, UsageError
from vlm2vla_training.jsonio import JsonlAppender, read_jsonl, sha256_of_files
from vlm2vla_training.progress import finish, track
from vlm2vla_training.spread import chosen_spread


def run_annotate(args: argparse.Namespace) -> int:
    """`annotate`: episodes -> annotated.jsonl."""
    if args.annotated is not None and args.annotator != "corrections":
        raise UsageError("--annotated is what --annotator corrections is laid on; other annotators start from the log")
    if args.means and args.annotator != "rules":
        raise UsageError("--means is for --annotator rules; corrections are laid on what rules wrote (--annotated)")
    if args.plain_names and args.annotator != "rules":
        raise UsageError("--plain-names is for --annotator rules; the others name things in their own words")
    if args.annotator == "gemini":
        from vlm2vla_training.annotation.gemini_command import run_gemini  # needs the extra gemini

        return run_gemini(args)
    started = time.monotonic()
    annotator = _annotator(args)
    dataset = EpisodeDataset(args.episodes)
    path = args.out / ANNOTATED_FILE
    done = {str(line["episode_key"]) for line in read_jsonl(path)} if path.exists() else set()
    keys = dataset.keys()
    left = [key for key in keys if key not in done]
    if args.dry_run:
        print(f"annotate: would annotate {len(left)} episodes with {annotator.name} ({len(done)} are done)")
        return 0
    failures: list[dict[str, str]] = []
    with JsonlAppender(path) as file:
        for episode in track(dataset.episodes(frozenset(done), images=False), len(left), "annotate"):
            try:
                file.append(annotator.annotate(episode).to_json())
            except TrainingError as error:
                failures.append({"episode_key": episode.key, "error": str(error)})
    summary = {"annotator": annotator.name, "failures": failures, **describe(path)}
    quarantined = summary["audit"]["quarantined"]
    line = f"{summary['episodes']} episodes, {quarantined} quarantined, {len(failures)} failed"
    if args.annotator == "corrections":
        summary["corrections"] = became = what_became_of_corrections(path)
        line += f", {became['used']} of {became['met']} corrections used"
    finish("annotate", args.out, summary, started, line)
    return 0


def meanings(given: list[str]) -> dict[str, str]:
    """Split each TEXT=ENGLISH of `--means`.

    Raises:
        UsageError: a side is empty, or one text was given two meanings.
    """
    found: dict[str, str] = {}
    for pair in given:
        text, _, english = (part.strip() for part in pair.partition("="))
        if not text or not english:
            raise UsageError(f"--means {pair!r}: expected TEXT=ENGLISH")
        if found.setdefault(text, english) != english:
            raise UsageError(f"--means gives {text!r} two meanings: {found[text]!r} and {english!r}")
    return found


def _annotator(args: argparse.Namespace) -> Annotator:
    if args.annotator == "rules":
        return RulesAnnotator(meanings(args.means), args.plain_names)
    if args.annotated is None:
        return on_annotator(RulesAnnotator())
    under = OnAnnotated(read_annotated(args.annotated))
    return CorrectionsAnnotator(under, under.name)


def run_curate(args: argparse.Namespace) -> int:
    """`curate`: episodes + annotations -> training examples."""
    started = time.monotonic()
    spread = chosen_spread(args)
    options = ExampleOptions(
        variant=args.variant,
        kinds=tuple(args.kinds.split(",")),
        plan_source=args.plan_source,
        extra_starts=args.extra_starts,
        verify_pairs=args.verify_pairs,
        verify_negatives=args.verify_negatives,
        single_dim_m=args.single_dim_m,
        absolute_m=args.absolute_m,
        chunk_mode=args.chunk_mode,
        max_row_translation_m=args.max_row_translation_m,
        max_rows=args.max_rows,
        seed=args.seed,
    )
    dataset = EpisodeDataset(args.episodes)
    decisions = read_decisions(args.decisions) if args.decisions else {}
    choice = choose(read_annotated(args.annotated), decisions)
    annotated = choice.kept
    if args.dry_run:
        counts = CurateCounts()
        for episode in annotated.values():
            count(counts, episode.episode_key, examples_of(episode, options))
        print(
            f"curate: would write {dict(counts.examples)}, drop {dict(counts.dropped)}; "
            f"{len(choice.left_out)} episodes left out"
        )
        return 0
    writer = ExampleWriter(args.out, options, args.image_size, decisions=decisions)
    counts = CurateCounts()
    for key, kind, detail in choice.left_out:
        counts.leave_out(key, kind, detail)
    out = frozenset(key for key, _, _ in choice.left_out)
    if spread is not None:
        curate_parts(args.episodes, annotated, args.out, options, args.image_size, counts, out, spread)
    else:
        for key in writer.done & annotated.keys():  # what an earlier run wrote belongs into the counts
            count(counts, key, examples_of(annotated[key], options))
        todo = len(set(dataset.keys()) - writer.done)
        episodes = dataset.episodes(frozenset(writer.done))
        for _ in track(curate(episodes, annotated, writer, options, counts, out), todo - len(out), "curate"):
            pass
    summary = {
        **counts.to_json(),
        "options": {**vars(options), "image_size_px": args.image_size},
        "decisions": choice.to_json(),
        "annotators": sorted({episode.annotator for episode in annotated.values()}),
        "sources": sorted(dataset.sources()),
        "data_hash": sha256_of_files(sorted(args.out.glob("part-*.parquet"))),
    }
    write_card(args.out, summary, dataset.sources())
    line = f"{summary['examples_total']} examples of {counts.episodes} episodes, {summary['dropped_total']} dropped"
    if choice.left_out:
        line += f", {len(choice.left_out)} episodes left out (quarantined or rejected)"
    if choice.stale:
        line += f", {len(choice.stale)} decisions about other annotations not used"
    finish("curate", args.out, summary, started, line)
    return 0
