"""The stages of the paper as data: which prompt, which grammar, which parser, how many tokens.

`policy` runs them. Prompt, grammar and parser follow the model's card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vlm2vla_schema import grammar, parsing, prompts
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.messages import DEFAULT_MOTION_PLAN_MAX_TOKENS
from vlm2vla_schema.types import Chunk, ModelCard, Verdict
from vlm2vla_server.errors import InvalidRequest

T = TypeVar("T")

ALL_STAGES: tuple[str, ...] = ("subtasks", "motion_plan", "actions")
FREE_TEXT_MAX_TOKENS = DEFAULT_MOTION_PLAN_MAX_TOKENS
"""Default for motion plans and visual questions: texts without a grammar."""


@dataclass(frozen=True)
class Stage(Generic[T]):
    """One stage, ready to run. parse raises ParseError on text that the stage may not say. cut_is_failure: text cut by
    max_tokens is a failed attempt. rows: makes the incremental parser of a stage whose rows can be streamed."""

    name: str
    prompt: str
    prompt_version: str
    parse: Callable[[str], T]
    grammar: str | None
    max_tokens: int
    cut_is_failure: bool = False
    rows: Callable[[], parsing.RowStream] | None = None


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name. adapter is None for the base. problem says why the adapter is not proven."""

    name: str
    adapter: str | None
    card: ModelCard
    proven: bool = True
    problem: str | None = None

    @property
    def policy(self) -> bool:
        """Whether a robot may be driven by it: trained to act, and proven active."""
        return self.card.policy and self.proven

    @property
    def stages(self) -> tuple[str, ...]:
        """The card's stages. An untouched base was trained for none and may be asked for all."""
        return tuple(self.card.stages) or ALL_STAGES

    def require_stage(self, stage: str) -> None:
        """Raises InvalidRequest when the model does not have the stage."""
        if stage not in self.stages:
            raise InvalidRequest(
                f"this model has no stage {stage!r}; its stages are: {', '.join(self.stages)}",
                details={"stages": list(self.stages)},
            )


def subtasks_stage(task: str) -> Stage[list[str]]:
    """Section 3.1: the main task into subtasks."""
    return Stage(
        name="subtasks",
        prompt=prompts.subtasks_prompt(task),
        prompt_version=prompts.PROMPT_VERSIONS["subtasks"],
        parse=parsing.parse_subtasks,
        grammar=grammar.subtasks_grammar(),
        max_tokens=grammar.longest_subtasks_bytes() + 1,
    )


def motion_plan_stage(subtask: str, control_tokens: frozenset[str]) -> Stage[str]:
    """Section 3.1: directions in words. It has no grammar. A plan with a control token's text would break out of the
    next prompt, so it counts as a failed attempt."""

    def parse(text: str) -> str:
        plan = parsing.parse_motion_plan(text)
        if any(token in plan for token in control_tokens):
            raise ParseError("the text spells a control token", text, "1 to 1500 characters of plain text")
        return plan

    return Stage(
        name="motion_plan",
        prompt=prompts.motion_plan_prompt(subtask),
        prompt_version=prompts.PROMPT_VERSIONS["motion_plan"],
        parse=parse,
        grammar=None,
        max_tokens=FREE_TEXT_MAX_TOKENS,
        cut_is_failure=True,
    )


def actions_stage(subtask: str, motion_plan: str | None, card: ModelCard, max_row_translation_m: float) -> Stage[Chunk]:
    """Section 3.1: rows as text, or as the tokens of Table 2 when the card says so."""

    def parse(text: str) -> Chunk:
        return parsing.parse_actions(text, max_row_translation_m, digit_map=card.digit_map)

    def rows() -> parsing.RowStream:
        return parsing.RowStream(max_row_translation_m, digit_map=card.digit_map)

    return Stage(
        name="actions",
        prompt=prompts.actions_prompt(subtask, motion_plan),
        prompt_version=prompts.PROMPT_VERSIONS["actions"],
        parse=parse,
        grammar=grammar.actions_grammar(max_row_translation_m, digit_map=card.digit_map),
        max_tokens=grammar.longest_actions_chars(max_row_translation_m, digit_map=card.digit_map) + 1,
        rows=rows,
    )


def verify_stage(subtask: str, next_subtask: str | None) -> Stage[Verdict]:
    """Appendix D.5: two images, one verdict."""
    return Stage(
        name="verify",
        prompt=prompts.verify_prompt(subtask, next_subtask),
        prompt_version=prompts.verify_prompt_version(next_subtask),
        parse=parsing.parse_verdict,
        grammar=grammar.verdict_grammar(),
        max_tokens=grammar.longest_verdict_bytes() + 1,
    )


def vqa_stage(question: str) -> Stage[str]:
    """Section 4.1: the question as it is, the answer as it comes."""
    return Stage(
        name="vqa",
        prompt=question,
        prompt_version=prompts.PROMPT_VERSIONS["vqa"],
        parse=str.strip,
        grammar=None,
        max_tokens=FREE_TEXT_MAX_TOKENS,
    )
