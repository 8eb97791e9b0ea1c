"""`verify-report`: how far a model can be believed when it says that a subtask is done, on held-out pairs of frames.

Pairs and prompts are those of `curate` (kinds `verify`, D.5, and `completion`, B.2). Both answers share their first
tokens; where they part, the model's probability of "done" against "not done" is read. A server says "done" above the
threshold of the model's card, one half where it has none; what a higher one would buy is told too, chosen on one half
of the episodes and measured on the other.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vla_schema import prompts
from vlm2vla_schema.images import decode_image, to_model_square
from vlm2vla_schema.parsing import format_verdict
from vlm2vla_schema.types import ModelCard, Verdict
from vlm2vla_training.analysis.figures import save, verifier_figure
from vlm2vla_training.analysis.model import LoadedModel
from vlm2vla_training.analysis.predict import drop_unfinished, held_out_keys
from vlm2vla_training.analysis.verify_figures import at_most, figures, halves, reliability
from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.annotation.files import read_annotated
from vlm2vla_training.curation.dataset import ExampleSet
from vlm2vla_training.curation.decisions import choose
from vlm2vla_training.curation.examples import Example, ExampleOptions, examples_of
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import JsonlAppender, read_jsonl, same_run, sha256_of_files
from vlm2vla_training.progress import finish, track
from vlm2vla_training.sft_data import Collator, Tokens

PAIRS_FILE = "pairs.jsonl"
KINDS = ("verify", "completion")
NEAR_ROWS = 3
"""A negative this close to the end of its step is a hard one: `curate` draws them from there."""


@dataclass(frozen=True)
class Pair:
    """One example with what is known about it.

    sort: "done"; of negatives "hard" (at most three rows before the end of the step), "earlier" (further from it),
    "other" (the first frame of this or another step) and "failed" (the end of a try that went wrong).
    """

    example: Example
    subtask: str
    done: bool
    sort: str


def run_verify_report(args: argparse.Namespace) -> int:
    """`verify-report`: score every pair, write pairs.jsonl, the figure and summary.json; a stopped run goes on."""
    started = time.monotonic()
    card = ModelCard.read(args.adapter or args.base)
    datasets = [EpisodeDataset(folder) for folder in args.episodes]
    annotated = {key: one for path in args.annotated for key, one in choose(read_annotated(path), {}).kept.items()}
    if args.write_threshold and args.adapter is None:
        raise UsageError("--write-threshold: expected --adapter, whose card it is for")
    chosen = held_out_keys(list(annotated), args.held_out)[: args.limit or None]
    path = args.out / PAIRS_FILE
    done = {str(line["episode_key"]) for line in read_jsonl(path) if line["last"]} if path.exists() else set()
    left = [key for key in chosen if key not in done]
    if not 0 < args.max_false_success < 1:
        raise UsageError(f"--max-false-success {args.max_false_success}: expected above 0 and below 1")
    if args.dry_run:
        print(f"verify-report: would ask {card.name!r} about {len(left)} episodes ({len(done)} are done)")
        return 0
    settings = {
        "model": card.name, "base_hash": card.base_hash, "pairs_a_step": args.verify_pairs, "seed": args.seed,
        "held_out": args.held_out, "next_subtask": not args.no_next_subtask, "dtype": args.dtype,
        "weights_hash": sha256_of_files(sorted((args.adapter or args.base).glob("*.safetensors"))),
    }  # fmt: skip
    same_run(args.out, settings)
    drop_unfinished(path)
    model = LoadedModel(args.base, args.adapter, card.image_size, args.device, args.dtype)
    options = ExampleOptions(kinds=KINDS, verify_pairs=args.verify_pairs, seed=args.seed)
    skip = frozenset().union(*(dataset.keys() for dataset in datasets)) - frozenset(left)
    episodes = (episode for dataset in datasets for episode in dataset.episodes(skip))
    found = set()
    with JsonlAppender(path) as file:
        for episode in track(episodes, len(left), "verify-report"):
            found.add(episode.key)
            pairs = pairs_of(annotated[episode.key], options, with_next=not args.no_next_subtask)
            lines = list(scored(model, card, episode, pairs, args.batch_size))
            for number, line in enumerate(lines, start=1):
                file.append({**line, "last": number == len(lines)})
    if set(left) - found:
        raise DataError(f"--episodes lacks annotated episodes, for example {min(set(left) - found)}")
    lines = [line for line in read_jsonl(path) if line["episode_key"] in set(chosen)]
    threshold = card.verify_threshold or 0.5
    kinds = report(lines, args.max_false_success, threshold)
    summary = {**settings, "episodes": len(chosen), "threshold": threshold, "kinds": kinds}
    if args.write_threshold:
        summary["written_threshold"] = _write_threshold(args.adapter, card, lines, args.max_false_success)
    asked = [line for line in lines if line["kind"] == "verify"] or lines
    save(verifier_figure(reliability(asked), asked), args.out, "verify")
    finish("verify-report", args.out, summary, started, summary_line(summary))
    return 0


def pairs_of(annotated: AnnotatedEpisode, options: ExampleOptions, with_next: bool = True) -> list[Pair]:
    """The pairs of one episode, as `curate` makes them. with_next False: D.5's wording for a last subtask."""
    steps = {step.first: (number, step) for number, step in enumerate(annotated.steps)}
    by_last = {step.last: (number, step) for number, step in enumerate(annotated.steps)}
    pairs = []
    for example in examples_of(annotated, options).examples:
        number, step = steps[example.first] if example.kind == "completion" else by_last[example.last]
        following = annotated.steps[number + 1] if number + 1 < len(annotated.steps) else None
        end = following.first if following else step.first if step.author else step.last
        done = example.completion in (prompts.COMPLETION_ANSWERS[True], _verdict(step.step_description, True))
        if not with_next and example.kind == "verify":
            changed = {"prompt": prompts.verify_prompt(step.step_description, None)}
            example = Example(**{**vars(example), **changed})
        pairs.append(Pair(example, step.step_description, done, _sort(done, example.images[1], step.first, end)))
    return pairs


def _sort(done: bool, after: int, first: int, end: int) -> str:
    if done:
        return "done"
    if after == end:
        return "failed"
    if not first < after < end:
        return "other"
    return "hard" if after >= end - NEAR_ROWS else "earlier"


def _verdict(subtask: str, success: bool) -> str:
    """The completion that `curate` writes."""
    state = "complete" if success else "not complete"
    return format_verdict(Verdict(success, "High", f"{subtask} is {state} in the after image."))


def scored(
    model: LoadedModel, card: ModelCard, episode: Episode, pairs: Sequence[Pair], batch_size: int
) -> Iterator[dict[str, Any]]:
    """One line a pair, with the model's probability that the subtask is done."""
    frames = sorted({step for pair in pairs for step in pair.example.images})
    images = [decode_image(episode.images[step - episode.first_step]) for step in frames]
    examples = ExampleSet(
        np.stack([to_model_square(image, card.image_size) for image in images]),
        [[frames.index(step) for step in pair.example.images] for pair in pairs],
        [pair.example.prompt for pair in pairs], [pair.example.completion for pair in pairs],
        [pair.example.kind for pair in pairs], [episode.key] * len(pairs),
    )  # fmt: skip
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        parted = {start + place: _parted(model, pair) for place, pair in enumerate(batch)}
        tokens = {place: one for place, (one, _) in parted.items()}
        collator = Collator(examples, tokens, model.encoder.processor)
        rows = model.log_probabilities(collator([{"example": place} for place in tokens]))
        for pair, row, (_, (yes, no)) in zip(batch, rows, parted.values(), strict=True):
            margin = float(row[-1, yes] - row[-1, no])
            yield {
                "episode_key": episode.key, "kind": pair.example.kind, "subtask": pair.subtask,
                "images": list(pair.example.images), "done": pair.done, "sort": pair.sort,
                "margin_nat": round(margin, 4), "mass": round(float(row[-1, [yes, no]].exp().sum()), 4),
            }  # fmt: skip


def _parted(model: LoadedModel, pair: Pair) -> tuple[Tokens, tuple[int, int]]:
    """The example up to the first token in which the two answers differ, and that token of either."""
    kind, answers = pair.example.kind, []
    for success in (True, False):
        text = prompts.COMPLETION_ANSWERS[success] if kind == "completion" else _verdict(pair.subtask, success)
        answers.append(model.encoder.encode(pair.example.prompt, text, 2))
    one, other = answers
    place = next(i for i, (a, b) in enumerate(zip(one.answer, other.answer, strict=False)) if a != b)
    return Tokens(one.prompt, one.answer[: place + 1]), (int(one.answer[place]), int(other.answer[place]))


def _write_threshold(adapter: Path, card: ModelCard, lines: Sequence[Mapping[str, Any]], limit: float) -> float | None:
    """Store in the adapter's card the least probability, from one half on, that holds `limit` on all `verify` pairs."""
    margin = at_most([line for line in lines if line["kind"] == "verify"], limit)
    above = math.floor(1e4 / (1 + math.exp(-margin)) + 1) / 1e4 if margin > 0 else None
    if above is not None and above >= 1:
        raise DataError(f"no threshold below 1 holds {limit:g} of false success on these pairs")
    card.model_copy(update={"verify_threshold": above}).write(adapter)
    return above


def report(lines: Sequence[Mapping[str, Any]], max_false_success: float, threshold: float = 0.5) -> dict[str, Any]:
    """Of each kind of example the figures as served, by verb, and at a threshold that keeps false success down.

    threshold: the probability from which /verify says "done"; `completion` has none.
    """
    result: dict[str, Any] = {}
    for kind in KINDS:
        asked = [line for line in lines if line["kind"] == kind]
        if not asked:
            continue
        served = math.log(threshold / (1 - threshold)) if kind == "verify" else 0.0
        by_verb: dict[str, list[Mapping[str, Any]]] = {}
        for line in asked:
            by_verb.setdefault(str(line["subtask"]).split()[0], []).append(line)
        result[kind] = {
            "served": figures(asked, served),
            "by_verb": {verb: figures(by_verb[verb], served) for verb in sorted(by_verb)},
            "calibration": reliability(asked),
            "with_threshold": _with_threshold(asked, max_false_success),
        }
    return result


def _with_threshold(lines: Sequence[Mapping[str, Any]], limit: float) -> dict[str, Any] | None:
    """The figures of one half of the episodes at the least threshold that held `limit` on the other; None where a half
    lacks one of the two answers."""
    choosing, measuring = halves(lines)
    if any(len({line["done"] for line in half}) < 2 for half in (choosing, measuring)):
        return None
    margin = at_most(choosing, limit)
    return {
        "max_false_success": limit,
        "margin_nat": round(margin, 4),
        "probability": round(float(1 / (1 + np.exp(-margin))), 4),
        "chosen_on": figures(choosing, margin),
        "measured_on": figures(measuring, margin),
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    """What was found, in one line."""
    parts = []
    for kind, found in summary["kinds"].items():
        served = found["served"]
        parts.append(
            f"{kind}: {served['pairs']} pairs, balanced accuracy {_percent(served['balanced_accuracy'])}, false "
            f"success {_percent(served['false_success'])}, hard negatives {_percent(served['rejected'].get('hard'))}"
        )
    return f"{summary['episodes']} episodes; " + "; ".join(parts)


def _percent(rate: float | None) -> str:
    return "of none" if rate is None else f"{100 * rate:.1f} %"
