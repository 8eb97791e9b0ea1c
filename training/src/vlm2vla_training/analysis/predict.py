"""`predict`: what a model says about held-out episodes, against what their logs did.

For every step that `curate` would imitate: the frame at its start, the step's name, then the inference cycle of D.6:
motion plan, then rows. Prompts and parsers are those of the server; decoding is greedy and without a grammar, so the
parse rate is the model's own. `--plan logged` gives the annotated sentence instead of asking for one.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema import grammar, prompts
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.images import decode_image, to_model_square
from vlm2vla_schema.messages import DEFAULT_MOTION_PLAN_MAX_TOKENS
from vlm2vla_schema.parsing import parse_actions, parse_motion_plan
from vlm2vla_schema.types import ModelCard
from vlm2vla_training.analysis.comparison import aggregate, compare, plan_agreement
from vlm2vla_training.analysis.model import LoadedModel
from vlm2vla_training.annotation.base import AnnotatedEpisode, AnnotatedStep
from vlm2vla_training.annotation.files import read_annotated
from vlm2vla_training.curation.decisions import choose
from vlm2vla_training.curation.examples import ExampleOptions, examples_of
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import JsonlAppender, read_jsonl, same_run, sha256_of_files
from vlm2vla_training.progress import finish, track
from vlm2vla_training.sft import split_by_episode

PREDICTIONS_FILE = "predictions.jsonl"


@dataclass(frozen=True)
class Task:
    """One step to predict: what is asked, and the logged rows, merged as `curate` merges them."""

    step: AnnotatedStep
    instruction: str
    plan: str
    gripper_before: float
    rows: list[list[float]]


def run_predict(args: argparse.Namespace) -> int:
    """`predict`: ask, compare, write predictions.jsonl and summary.json; a stopped run goes on where it was."""
    started = time.monotonic()
    card = ModelCard.read(args.adapter or args.base)
    dataset = EpisodeDataset(args.episodes)
    annotated = choose(read_annotated(args.annotated), {}).kept
    chosen = held_out_keys(list(annotated), args.held_out)[: args.limit or None]
    path = args.out / PREDICTIONS_FILE
    done = {str(line["episode_key"]) for line in read_jsonl(path) if line.get("last")} if path.exists() else set()
    left = [key for key in chosen if key not in done]
    if args.dry_run:
        print(f"predict: would ask {card.name!r} about {len(left)} episodes ({len(done)} are done)")
        return 0
    settings = {
        "model": card.name, "base_hash": card.base_hash, "plan": args.plan, "held_out": args.held_out,
        "adapter_hash": sha256_of_files(sorted(args.adapter.glob("*.safetensors"))) if args.adapter else None,
    }  # fmt: skip
    same_run(args.out, settings)
    drop_unfinished(path)
    model = LoadedModel(args.base, args.adapter, card.image_size, args.device, args.dtype)
    skip = frozenset(dataset.keys()) - frozenset(left)
    found = set()
    with JsonlAppender(path) as file:
        for episode in track(dataset.episodes(skip), len(left), "predict"):
            found.add(episode.key)
            lines = list(predictions(model, card, episode, annotated[episode.key], args.plan))
            for number, line in enumerate(lines, start=1):
                file.append({**line, "last": number == len(lines)})
    if set(left) - found:
        raise DataError(f"{args.episodes} lacks annotated episodes, for example {min(set(left) - found)}")
    lines = [line for line in read_jsonl(path) if line["episode_key"] in set(chosen)]
    summary = {**settings, "episodes": len(chosen), **aggregate(lines), "by_verb": by_verb(lines)}
    finish("predict", args.out, summary, started, summary_line(summary))
    return 0


def held_out_keys(keys: list[str], fraction: float) -> list[str]:
    """The episodes that `sft --held-out` of the same fraction kept from training; all of them for 1."""
    if fraction == 1:
        return sorted(keys)
    _, held = split_by_episode(keys, fraction)
    if not held:
        raise UsageError(f"--held-out {fraction}: expected above 0; 1 takes every episode")
    return sorted(keys[place] for place in held)


def drop_unfinished(path: Path) -> None:
    """Leave out the lines of an episode that was stopped in its middle: it is asked again as a whole."""
    if not path.exists():
        return
    lines = list(read_jsonl(path))
    whole = {line["episode_key"] for line in lines if line["last"]}
    if len(whole) == len({line["episode_key"] for line in lines}):
        return
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with JsonlAppender(partial) as file:
        for line in lines:
            if line["episode_key"] in whole:
                file.append(line)
    partial.replace(path)


def tasks_of(annotated: AnnotatedEpisode) -> list[Task]:
    """The steps that are imitated, with the rows that `curate` makes of them; steps beyond the parser's limits are
    left out there and here.
    """
    steps = {step.first: (number, step) for number, step in enumerate(annotated.steps)}
    tasks = []
    for example in examples_of(annotated, ExampleOptions(kinds=("actions",))).examples:
        number, step = steps[example.first]
        before = annotated.steps[number - 1].actions[-1][3] if number else step.actions[0][3]
        rows = parse_actions(example.completion).rows
        tasks.append(Task(step, annotated.instruction, step.main_movements, before, rows))
    return tasks


def predictions(
    model: LoadedModel, card: ModelCard, episode: Episode, annotated: AnnotatedEpisode, plan_from: str
) -> Iterator[dict[str, Any]]:
    """One line a step: what was said, and the comparison, null where the rows did not parse."""
    for task in tasks_of(annotated):
        image = episode.images[task.step.first - episode.first_step]
        pixels = to_model_square(decode_image(image), card.image_size)
        plan, text = _cycle(model, card, task, pixels, plan_from)
        said = plan if plan_from == "own" else None
        try:
            rows = None if text is None else parse_actions(text, digit_map=card.digit_map).rows
        except ParseError:
            rows = None
        asked = "motion_plan" in (card.stages or ("motion_plan",)) and plan_from == "own"
        yield {
            "episode_key": episode.key,
            "first": task.step.first,
            "subtask": task.step.step_description,
            "plan": plan,
            "plan_parsed": (plan is not None) if asked else None,
            "plan_agreement": plan_agreement(said, task.rows) if said else None,
            "text": text,
            "rows": rows,
            "logged": task.rows,
            "comparison": compare(rows, task.rows, task.gripper_before) if rows is not None else None,
        }


def _cycle(
    model: LoadedModel, card: ModelCard, task: Task, pixels: NDArray[np.uint8], plan_from: str
) -> tuple[str | None, str | None]:
    """Plan and the rows' text; no text where the plan failed, as the server would then not ask for rows."""
    limit = grammar.longest_actions_chars(digit_map=card.digit_map) + 1
    if card.stages == ["actions"]:
        return None, model.answer(prompts.actions_prompt(task.instruction, None), pixels, limit)[0]
    subtask, plan = task.step.step_description, task.plan
    if plan_from == "own":
        said, ended = model.answer(prompts.motion_plan_prompt(subtask), pixels, DEFAULT_MOTION_PLAN_MAX_TOKENS)
        try:
            plan = parse_motion_plan(said)
        except ParseError:
            return None, None
        if not ended:
            return None, None
    return plan, model.answer(prompts.actions_prompt(subtask, plan), pixels, limit)[0]


def by_verb(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The same figures for each first word of a subtask: moving and grasping are different skills."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[str(line["subtask"]).split()[0]].append(line)
    return {verb: aggregate(groups[verb]) for verb in sorted(groups)}


def summary_line(summary: dict[str, Any]) -> str:
    """What was found, in one line."""
    line = f"{summary['steps']} steps of {summary['episodes']} episodes, parsed {_percent(summary['parse_rate'])}"
    if summary["end_error_mm"] is None:
        return line
    off, still, gripper = (summary[name] for name in ("end_error_mm", "still_error_mm", "gripper_rows_off"))
    events = "no gripper event to compare" if gripper is None else f"gripper off {gripper['mean']:.2f} rows"
    return (
        f"{line}, directions agree {_percent(summary['direction_agreement'])}, end point off {off['median']:.1f} mm "
        f"(median; standing still {still['median']:.1f}), {events}"
    )


def _percent(rate: float | None) -> str:
    return "of none" if rate is None else f"{100 * rate:.1f} %"
