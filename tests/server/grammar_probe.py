"""What the grammars promise, measured: completions that training writes are accepted, constrained text parses, and a
grammar changes no greedy text that was canonical already. For tests, and for bench/grammar_checks.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import xgrammar
from numpy.typing import NDArray

from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image
from vlm2vla_schema.types import ModelCard
from vlm2vla_server.engines.base import Engine, GenerationRequest
from vlm2vla_server.stages import Stage, actions_stage, subtasks_stage, verify_stage

ROW_LIMIT_M = 0.10
SHOWN = 10
"""Exceptions are counted all and listed up to here."""
SHOWN_CHARS = 300


@dataclass(frozen=True)
class Frame:
    """A picture uint8 [size, size, 3] with the actions prompt that names its subtask and motion plan."""

    name: str
    image: NDArray[np.uint8]
    prompt: str


class Acceptor:
    """The real xgrammar with the vocabulary of one model."""

    def __init__(self, model: Path) -> None:
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        end_of_turn = self._tokenizer.get_vocab().get("<end_of_turn>")
        self._stop = int(self._tokenizer.eos_token_id if end_of_turn is None else end_of_turn)
        info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, stop_token_ids=[self._stop])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def problem(self, ebnf: str, text: str) -> str | None:
        """None when the grammar accepts the whole text, as bytes and as the tokens that training would see."""
        compiled = self._compiler.compile_grammar(ebnf)  # compiled once: the compiler keeps what it compiled
        matcher = xgrammar.GrammarMatcher(compiled)
        if not matcher.accept_string(text.encode()):
            return "refused as bytes"
        if not matcher.accept_token(self._stop):
            return "refused as bytes: it may not end there"
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
            return "its tokens give another text"
        matcher = xgrammar.GrammarMatcher(compiled)
        for place, token in enumerate([*ids, self._stop]):
            if not matcher.accept_token(token):
                return f"refused as tokens, at token {place}"
        return None


def probe_stages(card: ModelCard) -> dict[str, Stage[Any]]:
    """Every stage that has a grammar, as the server runs it."""
    return {
        "actions": actions_stage("Move to Carrot", "Move forward and down.", card, ROW_LIMIT_M),
        "subtasks": subtasks_stage("pick up the carrot"),
        "verdict": verify_stage("Move to Carrot", "Grasp Carrot"),
    }


def acceptance(acceptor: Acceptor, stage: Stage[Any], completions: Sequence[str]) -> dict[str, Any]:
    """How many completions the stage's grammar accepts and its parser parses. Equal ones are tried once."""
    assert stage.grammar is not None
    counts: dict[str, int] = {}
    for completion in completions:
        counts[completion] = counts.get(completion, 0) + 1
    refused: list[dict[str, Any]] = []
    unparsed: list[dict[str, Any]] = []
    for text, times in counts.items():
        found = {"grammar": acceptor.problem(stage.grammar, text), "parser": _parse_problem(stage, text)}
        for part, problem in found.items():
            if problem is not None:
                (refused if part == "grammar" else unparsed).append({"text": text, "times": times, "problem": problem})
    return {
        "completions": len(completions),
        "distinct": len(counts),
        "accepted": len(completions) - sum(entry["times"] for entry in refused),
        "parsed": len(completions) - sum(entry["times"] for entry in unparsed),
        "refused": refused[:SHOWN],
        "unparsed": unparsed[:SHOWN],
    }


async def agreement(
    engine: Engine, frames: Sequence[Frame], card: ModelCard, adapter: str | None, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Greedy rows with and without the grammar. `share`: of the free texts that parse, how many are the constrained
    text too, byte for byte; None when none parses."""
    stage = probe_stages(card)["actions"]
    differing: list[dict[str, Any]] = []
    unparsed: list[dict[str, Any]] = []
    constrained_parsed = same_rows = 0
    for number, frame in enumerate(frames, start=1):
        request = GenerationRequest((frame.image,), frame.prompt, adapter, 0.0, 1.0, 0, stage.max_tokens)
        free, finish, _ = await generate(engine, request)
        bound, bound_finish, _ = await generate(engine, _with_grammar(request, stage))
        bound_problem = _parse_problem(stage, bound)
        constrained_parsed += bound_problem is None
        problem = _parse_problem(stage, free)
        if problem is not None:
            unparsed.append(_shown(frame=frame.name, finish=finish, problem=problem, text=free))
        elif free != bound:
            same = bound_problem is None and stage.parse(free) == stage.parse(bound)
            same_rows += same
            differing.append(
                {
                    "frame": frame.name,
                    "free": free,
                    "constrained": bound,
                    "constrained_finish": bound_finish,
                    "same_rows": same,
                }
            )
        progress(number)
    parseable = len(frames) - len(unparsed)
    equal = parseable - len(differing)
    return {
        "frames": len(frames),
        "parseable": parseable,
        "equal": equal,
        "share": equal / parseable if parseable else None,
        "same_rows": equal + same_rows,
        "constrained_parsed": constrained_parsed,
        "differing": differing,
        "unparseable": unparsed[:SHOWN],
    }


async def random_generations(
    engine: Engine, name: str, card: ModelCard, count: int, first_seed: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Constrained generations at temperature 1 and top_p 1, one a seed. `cut`: those that the token limit or the
    model's context ended. `refused`: those that ended by themselves and yet do not parse, which no grammar may allow.
    """
    stage = probe_stages(card)[name]
    images = 2 if name == "verdict" else 1
    parsed = cut = refused = 0
    lengths: list[int] = []
    failures: list[dict[str, Any]] = []
    for number, seed in enumerate(range(first_seed, first_seed + count), start=1):
        pictures = tuple(probe_image((seed + place) % len(PROBE_PROMPTS), card.image_size) for place in range(images))
        request = GenerationRequest(pictures, stage.prompt, None, 1.0, 1.0, seed, stage.max_tokens)
        text, finish, tokens = await generate(engine, _with_grammar(request, stage))
        lengths.append(tokens)
        problem = _parse_problem(stage, text)
        parsed += problem is None
        cut += finish != "stop"
        if problem is not None:
            refused += finish == "stop"
            failures.append(_shown(seed=seed, finish=finish, problem=problem, text=text))
        progress(number)
    return {
        "generations": count,
        "parsed": parsed,
        "cut": cut,
        "refused": refused,
        "tokens": {"median": float(np.median(lengths)) if lengths else None, "max": max(lengths, default=None)},
        "failures": failures[:SHOWN],
    }


async def generate(engine: Engine, request: GenerationRequest) -> tuple[str, str, int]:
    """(text, finish reason, tokens) of one generation."""
    deltas = [delta async for delta in engine.generate(request)]
    return "".join(delta.text for delta in deltas), str(deltas[-1].finish_reason), deltas[-1].completion_tokens


def _with_grammar(request: GenerationRequest, stage: Stage[Any]) -> GenerationRequest:
    return dataclasses.replace(request, grammar=stage.grammar)


def _parse_problem(stage: Stage[Any], text: str) -> str | None:
    try:
        stage.parse(text)
    except ParseError as problem:
        return str(problem)
    return None


def _shown(*, text: str, **facts: Any) -> dict[str, Any]:
    return {**facts, "text": text[:SHOWN_CHARS], "chars": len(text)}
