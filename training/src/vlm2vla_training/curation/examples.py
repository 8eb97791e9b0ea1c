"""One annotated episode -> training examples of every kind (paper sections 3.1, 3.2 and B.2).

Prompts come from vlm2vla_schema.prompts and completions from vlm2vla_schema.parsing, so that training and serving
share every character. An example that the parser would refuse is not written: it is returned as a drop with its reason.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vlm2vla_schema import prompts
from vlm2vla_schema.digits import encode_digits
from vlm2vla_schema.directions import NAMES
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.parsing import (
    format_actions,
    format_subtasks,
    format_verdict,
    parse_actions,
    parse_motion_plan,
)
from vlm2vla_schema.types import Verdict
from vlm2vla_training.annotation.base import AnnotatedEpisode, AnnotatedStep
from vlm2vla_training.curation.chunking import Mode, chunk_actions
from vlm2vla_training.curation.motion import directions, motion_sentence, summed
from vlm2vla_training.errors import DataError, UsageError

Variant = Literal["main", "at", "nr"]
PlanSource = Literal["main_movements", "reasoning", "both"]
VARIANTS: tuple[Variant, ...] = ("main", "at", "nr")
KINDS = ("subtasks", "motion_plan", "actions", "completion", "verify", "direction")
# Table 2 of the paper: digits 0..9 as Gemma-3's ten least likely tokens.
DIGIT_MAP = {str(digit): f"<unused{6133 + digit}>" for digit in range(10)}

# A frame this close to the end of its step, with nothing left for the gripper to do, shows a finished step.
_FINISHED_M = 0.015
# A start inside a step needs at least this much left to do.
_WORTH_STARTING_M = 0.005


@dataclass(frozen=True)
class ExampleOptions:
    """What `curate` may choose; written into the card.

    Attributes:
        variant: "main" (text), "at" (digits of actions as tokens, B.3) or "nr" (actions only, task as the subtask).
        kinds: which of KINDS to write; "nr" writes actions only.
        plan_source: annotation field that becomes the motion plan.
        extra_starts: further frames inside each step from which the rest of the step is an example too. The paper
            uses none; a closed loop retries from such frames.
        verify_pairs: positive and negative pairs of `verify` a step.
        verify_negatives: negatives for each positive of these. More make a model say "done" only when it is surer.
        single_dim_m, absolute_m, chunk_mode: see `chunk_actions`.
        max_row_translation_m, max_rows: limits of the parser; an action example beyond them is dropped.
        seed: of every random choice, together with the episode key.
    """

    variant: Variant = "main"
    kinds: tuple[str, ...] = KINDS
    plan_source: PlanSource = "main_movements"
    extra_starts: int = 0
    verify_pairs: int = 2
    verify_negatives: int = 1
    single_dim_m: float = 0.025
    absolute_m: float = 0.05
    chunk_mode: Mode = "paper"
    max_row_translation_m: float = 0.10
    max_rows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            UsageError: an unknown variant, kind or plan source.
        """
        unknown = set(self.kinds) - set(KINDS)
        if unknown or self.variant not in VARIANTS or self.plan_source not in ("main_movements", "reasoning", "both"):
            raise UsageError(
                f"unknown kind {sorted(unknown)}, variant {self.variant!r} or plan source {self.plan_source!r}"
            )


@dataclass(frozen=True)
class Example:
    """One prompt and completion; `images` are original step numbers, `first` and `last` the rows it is about."""

    images: tuple[int, ...]
    prompt: str
    completion: str
    kind: str
    episode_key: str
    first: int
    last: int
    prompt_version: str
    variant: Variant


@dataclass
class EpisodeExamples:
    """Examples of one episode, what was dropped as (kind, first, reason), and how many failed steps were only shown to
    the verifier.
    """

    examples: list[Example] = field(default_factory=list)
    drops: list[tuple[str, int, str]] = field(default_factory=list)
    not_imitated: int = 0


def examples_of(episode: AnnotatedEpisode, options: ExampleOptions) -> EpisodeExamples:
    """Build every example of one annotated episode; deterministic in (options, episode).

    Raises:
        DataError: the annotation has no steps.
    """
    if not episode.steps:
        raise DataError(f"annotated episode {episode.episode_key} has no steps")
    return _Builder(episode, options).build()


class _Builder:
    """Holds what the kinds share while one episode is turned into examples."""

    def __init__(self, episode: AnnotatedEpisode, options: ExampleOptions) -> None:
        self.episode = episode
        self.options = options
        self.result = EpisodeExamples()
        digest = hashlib.sha256(f"{options.seed}/{episode.episode_key}".encode()).digest()
        self.random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        self.steps = episode.steps

    def build(self) -> EpisodeExamples:
        kinds = ("actions",) if self.options.variant == "nr" else self.options.kinds
        for index, step in enumerate(self.steps):
            if step.cut:
                continue
            starts = [step.first, *self._extra_starts(index)]
            # What the log itself does again right away went wrong: it shows the verifier a failure, it is not imitated.
            imitated = self._completed(index)
            if not imitated:
                self.result.not_imitated += 1
            for start in starts if imitated else ():
                for kind, add in (
                    ("subtasks", self._subtasks),
                    ("motion_plan", self._motion_plan),
                    ("actions", self._actions),
                    ("direction", self._direction),
                ):
                    if kind in kinds:
                        add(index, start)
            if "completion" in kinds:
                self._completion(index)
            if "verify" in kinds:
                self._verify(index)
        return self.result

    # Frames

    def _end_frame(self, index: int) -> int:
        """Frame that shows the step done: o_{i+1}, for the last step the last frame of the log. A rollout ends with a
        row that moves, so the last frame of a person's step does not show it done: its own first says there is none.
        """
        if index + 1 < len(self.steps):
            return self.steps[index + 1].first
        step = self.steps[index]
        return step.first if step.author else step.last

    def _completed(self, index: int) -> bool:
        """False for a step that the log itself repeats right away, such as a failed grasp, or that is marked missed."""
        following = self.steps[index + 1] if index + 1 < len(self.steps) else None
        if self.steps[index].missed:
            return False
        if self.steps[index].author:  # a verifier has seen it done, whatever the next rows are called
            return True
        return following is None or following.step_description != self.steps[index].step_description

    def _left(self, step: AnnotatedStep, start: int) -> list[list[float]]:
        return step.actions[start - step.first :]

    def _gripper_before(self, index: int, start: int) -> float | None:
        step = self.steps[index]
        if start > step.first:
            return step.actions[start - step.first - 1][3]
        return self.steps[index - 1].actions[-1][3] if index else None

    def _work_left(self, index: int, start: int) -> tuple[float, bool]:
        """Distance to travel from `start` to the step's end in metres, and whether the gripper still changes."""
        rows = self._left(self.steps[index], start)
        before = self._gripper_before(index, start)
        grippers = [row[3] for row in rows]
        changes = len(set(grippers)) > 1 or (before is not None and bool(grippers) and grippers[0] != before)
        return float(np.linalg.norm(summed(rows))), changes

    def _extra_starts(self, index: int) -> list[int]:
        step = self.steps[index]
        usable = []
        for start in range(step.first + 1, step.last + 1):
            left_m, changes = self._work_left(index, start)
            if changes or left_m >= _WORTH_STARTING_M:
                usable.append(start)
        count = min(self.options.extra_starts, len(usable))
        return sorted(int(start) for start in self.random.choice(usable, count, replace=False)) if count else []

    # Kinds

    def _add(
        self,
        kind: str,
        images: tuple[int, ...],
        prompt: str,
        completion: str,
        rows: tuple[int, int],
        version: str | None = None,
    ) -> None:
        version = version or prompts.PROMPT_VERSIONS[kind]
        self.result.examples.append(
            Example(images, prompt, completion, kind, self.episode.episode_key, *rows, version, self.options.variant)
        )

    def _drop(self, kind: str, start: int, reason: str) -> None:
        self.result.drops.append((kind, start, reason))

    def _subtasks(self, index: int, start: int) -> None:
        names: list[str] = []
        for step in self.steps[index:]:
            if not step.cut and (not names or names[-1] != step.step_description):
                names.append(step.step_description)
        try:
            completion = format_subtasks(names)
        except ValueError as error:
            return self._drop("subtasks", start, str(error))
        prompt = prompts.subtasks_prompt(self.episode.instruction)
        self._add("subtasks", (start,), prompt, completion, (start, self.steps[-1].last))

    def _plan(self, index: int, start: int) -> str:
        step = self.steps[index]
        if start > step.first:
            return motion_sentence(self._left(step, start), self._gripper_before(index, start))
        if self.options.plan_source == "both":
            return " ".join(dict.fromkeys((step.reasoning, step.main_movements)))
        return step.reasoning if self.options.plan_source == "reasoning" else step.main_movements

    def _motion_plan(self, index: int, start: int) -> None:
        step, plan = self.steps[index], self._plan(index, start)
        try:
            parse_motion_plan(plan)
        except ParseError as error:
            return self._drop("motion_plan", start, str(error))
        if any(letter.isdigit() for letter in plan):
            return self._drop("motion_plan", start, "the motion plan holds digits")
        prompt = prompts.motion_plan_prompt(step.step_description)
        self._add("motion_plan", (start,), prompt, plan, (start, step.last))

    def _actions(self, index: int, start: int) -> None:
        step, options = self.steps[index], self.options
        rows = chunk_actions(self._left(step, start), options.single_dim_m, options.absolute_m, options.chunk_mode)
        text = format_actions(rows)
        try:
            parse_actions(text, options.max_row_translation_m, options.max_rows)
        except ParseError as error:
            return self._drop("actions", start, str(error))
        if options.variant == "nr":
            prompt = prompts.actions_prompt(self.episode.instruction, None)
        else:
            prompt = prompts.actions_prompt(step.step_description, self._plan(index, start))
        completion = encode_digits(text, DIGIT_MAP) if options.variant == "at" else text
        self._add("actions", (start,), prompt, completion, (start, step.last))

    def _direction(self, index: int, start: int) -> None:
        step = self.steps[index]
        found = directions(summed(self._left(step, start)), self.options.single_dim_m)
        words = [next((word for word in pair if word in found), "none") for pair in NAMES]
        prompt = prompts.direction_prompt(step.step_description)
        self._add("direction", (start,), prompt, ", ".join(words), (start, step.last))

    def _completion(self, index: int) -> None:
        """B.2's tuple (o_i, o_j, l_i): one positive with j = i + 1, one negative with another step's frame."""
        step, end = self.steps[index], self._end_frame(index)
        if end == step.first:
            return self._drop("completion", step.first, "no later frame shows the step done")
        prompt = prompts.completion_prompt(step.step_description)
        pairs = [(end, self._completed(index))]
        others = [
            other.first for j, other in enumerate(self.steps) if j not in (index, index + 1) and not other.cut
        ]
        if others:
            pairs.append((int(self.random.choice(others)), False))
        for after, done in pairs:
            completion = prompts.COMPLETION_ANSWERS[done]
            self._add("completion", (step.first, after), prompt, completion, (step.first, step.last))

    def _verify(self, index: int) -> None:
        """D.5 pairs: success when `after` is the end of the step. Negatives: frames one to three before the end that
        still have work left (hard), and earlier frames.

        The first pair's `before` is the step's start, the others' any frame up to `after`: a subtask that is tried
        again is judged from where the last try ended, which may be done already. Never is `before` the later one.
        """
        first, end = self.steps[index].first, self._end_frame(index)
        if end == first:
            return self._drop("verify", first, "no later frame shows the step done")
        for pair in range(self.options.verify_pairs):
            before = first if pair == 0 else int(self.random.integers(first, end + 1))
            self._verdict(index, before, end, self._completed(index))
            for negative in range(self.options.verify_negatives):
                wrong = self._wrong_after(index, end, hard=(pair + negative) % 2 == 0)
                if wrong is not None:
                    start = first if wrong >= first else self.steps[0].first
                    before = start if pair == 0 or wrong == start else int(self.random.integers(start, wrong + 1))
                    self._verdict(index, before, wrong, False)

    def _wrong_after(self, index: int, end: int, hard: bool) -> int | None:
        step = self.steps[index]
        near = [frame for frame in range(max(step.first + 1, end - 3), end) if self._unfinished(index, frame)]
        others = [other.first for other in self.steps[: index + 1]]
        others += [frame for frame in range(step.first + 1, end - 3) if self._unfinished(index, frame)]
        choices = near if hard and near else others
        return int(self.random.choice(choices)) if choices else None

    def _unfinished(self, index: int, frame: int) -> bool:
        """Whether a frame inside a step shows it not done. Of a try that went wrong only what the gripper still has to
        do says so: a motion that ended beside may have been right on its way.
        """
        left_m, changes = self._work_left(index, frame)
        return changes or (left_m >= _FINISHED_M and self._completed(index))

    def _verdict(self, index: int, before: int, after: int, success: bool) -> None:
        step = self.steps[index]
        names = (other.step_description for other in self.steps[index + 1 :] if not other.cut)
        following = next((name for name in names if name != step.step_description), None)
        state = "complete" if success else "not complete"
        verdict = Verdict(success, "High", f"{step.step_description} is {state} in the after image.")
        try:
            completion = format_verdict(verdict)
        except ValueError as error:
            return self._drop("verify", before, str(error))
        prompt = prompts.verify_prompt(step.step_description, following)
        version = prompts.verify_prompt_version(following)
        self._add("verify", (before, after), prompt, completion, (before, step.last), version)
