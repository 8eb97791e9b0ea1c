"""What every engine must do, on the twin's model: transformers and an OpenAI endpoint here, vLLM in .venv-vllm."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_contract import Subject, first
from server_fakes import until

from vlm2vla_schema import grammar, parsing, prompts
from vlm2vla_server.engines.base import GenerationRequest, GrammarRefused, PromptTooLong, ScoreRequest
from vlm2vla_server.errors import ServerError

pytestmark = pytest.mark.timeout(3600)

IMAGE_SIZE = 112
IMAGE = np.random.default_rng(1).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
OTHER = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 200, dtype=np.uint8)
ACTIONS = prompts.actions_prompt("Move to Carrot", "Move forward and down.")
ASK = GenerationRequest((IMAGE,), ACTIONS, None, 1.0, 0.95, 3, 24)
ENDLESS = replace(ASK, grammar="root ::= [a-z]{3000}\n", max_tokens=2000)
LATE_TOKENS = 3
"""One may be in the making when a stream is closed, and one on its way; the third is room for a busy machine."""


def score(subject: Subject, adapter: str | None, *images: Any, completion: str = "a carrot") -> list[float]:
    return subject.run(subject.engine.score(ScoreRequest(images, "What is it?", completion, adapter)))


def test_every_adapter_fits_and_facts_are_told(subject: Subject) -> None:
    info = subject.engine.info()
    assert [(a.name, a.problem) for a in info.adapters] == [("twin", None), ("one", None), ("my.two", None)]
    if info.device == "endpoint":  # weights are somewhere else: nothing of them is made up
        assert info.dtype == "unknown" and not info.model_hash and "httpx" in info.versions
        assert all(a.adapted_modules is None and not a.hash for a in info.adapters)
    else:
        assert info.device == "cpu" and info.dtype == "float32" and info.context_tokens == 4096
        assert all(a.adapted_modules == 28 and len(a.hash) == 64 for a in info.adapters)
        assert len(info.model_hash) == 64 and {"torch", "transformers"} <= info.versions.keys()
    assert subject.models.control_tokens <= subject.engine.control_tokens()


def test_the_picture_changes_the_answer(subject: Subject) -> None:
    one, other, none, both = (score(subject, None, *images) for images in ((IMAGE,), (OTHER,), (), (IMAGE, OTHER)))
    for a, b in ((one, other), (one, none), (one, both), (other, none)):
        assert np.abs(np.subtract(a, b)).mean() > 1e-3
    assert all(value < 0 for value in (*one, *other, *none, *both))


def test_adapters_differ_from_the_base_and_from_one_another(subject: Subject) -> None:
    names = [None, "twin", "one", "my.two", None, "twin"]
    found = [score(subject, name, IMAGE) for name in names]
    assert found[4] == pytest.approx(found[0], abs=1e-4) and found[5] == pytest.approx(found[1], abs=1e-4)
    for i in range(4):
        for j in range(i):
            assert np.abs(np.subtract(found[i], found[j])).mean() > 0.01, (names[i], names[j])
    greedy = {name: subject.text(replace(ASK, adapter=name, temperature=0.0)) for name in (None, "twin", "one")}
    assert len(set(greedy.values())) > 1, greedy


def test_requests_for_several_adapters_at_once_keep_apart(subject: Subject) -> None:
    # A question that the base is sure about: a batch of several adds up in another order, which can turn a near tie.
    ask = replace(ASK, prompt="What colour is the carrot?", temperature=0.0, max_tokens=12)
    asks = [replace(ask, adapter=name) for name in (None, "twin", "one", "my.two")]

    async def together() -> list[str]:
        return [text for text, _ in await asyncio.gather(*(subject.collect(ask) for ask in asks))]

    assert subject.run(together()) == [subject.text(ask) for ask in asks]


def test_a_seed_says_everything_and_greedy_needs_none(subject: Subject) -> None:
    ask = replace(ENDLESS, max_tokens=16)  # unconstrained, this model often says one word only
    texts = [subject.text(replace(ask, seed=seed, temperature=1.5, top_p=1.0)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [subject.text(replace(ask, temperature=0.0, seed=seed)) for seed in (1, 2)]
    assert greedy[0] == greedy[1] not in texts


@pytest.mark.parametrize("name", ["actions", "subtasks", "verdict"])
@pytest.mark.parametrize("adapter", [None, "twin"])
def test_the_grammar_is_obeyed(subject: Subject, name: str, adapter: str | None) -> None:
    ebnf, parse = {
        "actions": (grammar.actions_grammar(), parsing.parse_actions),
        "subtasks": (grammar.subtasks_grammar(), parsing.parse_subtasks),
        "verdict": (grammar.verdict_grammar(), parsing.parse_verdict),
    }[name]
    ask = replace(ASK, grammar=ebnf, max_tokens=2500, adapter=adapter, temperature=1.5, top_p=1.0)
    text, deltas = subject.run(subject.collect(ask))
    assert deltas[-1].finish_reason == "stop" and parse(text)  # type: ignore[operator]  # parsers of several types


def test_reserved_tokens_are_text_and_control_tokens_are_not(subject: Subject) -> None:
    digits = {str(d): f"<unused{6133 + d}>" for d in range(10)}
    few = grammar.actions_grammar(max_rows=1, digit_map=digits)  # where they are no tokens, they are spelt
    text = subject.text(replace(ASK, grammar=few, max_tokens=2500, temperature=1.5, top_p=1.0))
    assert "<unused6133>" in text and parsing.parse_actions(text, digit_map=digits).rows
    free = subject.text(replace(ASK, temperature=2.0, top_p=1.0, max_tokens=200))
    assert not any(token in free for token in subject.engine.control_tokens())


def test_deltas_come_one_by_one_and_join_to_the_text(subject: Subject) -> None:
    text, deltas = subject.run(subject.collect(replace(ENDLESS, max_tokens=20, temperature=0.0)))
    assert deltas[-1].finish_reason == "length" and deltas[-1].completion_tokens == 20
    assert len(deltas) >= 10 and sum(len(delta.text) > 0 for delta in deltas) >= 10
    assert text.isascii() and text.isalpha() and text == subject.text(replace(ENDLESS, max_tokens=20, temperature=0.0))
    assert all(delta.prompt_tokens > 20 and delta.queue_ms >= 0 for delta in deltas)


def test_the_image_is_read_once_for_plan_and_rows(subject: Subject) -> None:
    # Two pictures: with their marks they fill one block of vLLM's prefix cache, 32 tokens; one of the twin's does not.
    picture = np.random.default_rng(77).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    plan = replace(
        ASK,
        images=(picture, picture[:, ::-1].copy()),
        prompt=prompts.motion_plan_prompt("Move"),
        adapter="twin",
        temperature=0.0,
        max_tokens=4,
    )
    rows = replace(plan, prompt=ACTIONS)
    fresh = subject.run(subject.collect(plan))[1][-1].cached_tokens
    text, deltas = subject.run(subject.collect(rows))
    assert fresh == 0 and deltas[-1].cached_tokens >= 32
    assert subject.text(rows) == text
    for changed in (replace(rows, adapter="one"), replace(rows, images=(picture[::-1].copy(), picture))):
        assert subject.run(subject.collect(changed))[1][-1].cached_tokens == 0


def test_closing_a_stream_frees_the_engine_within_a_token(subject: Subject) -> None:
    async def work() -> int:
        stream: Any = subject.engine.generate(ENDLESS)
        await first(stream, 5)
        before = subject.engine.load().decoded_tokens
        assert subject.engine.load().running == 1
        await stream.aclose()
        await until(lambda: subject.engine.load().running == 0)
        await subject.collect(replace(ASK, max_tokens=1))  # whatever was late has arrived
        return subject.engine.load().decoded_tokens - 1 - before

    assert subject.run(work()) <= LATE_TOKENS


def test_cancelling_the_reader_frees_the_engine(subject: Subject) -> None:
    async def work() -> None:
        task = asyncio.create_task(subject.collect(ENDLESS))
        await until(lambda: subject.engine.load().running == 1, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: subject.engine.load().running == 0)

    subject.run(work())


def test_max_tokens_ends_with_length(subject: Subject) -> None:
    for limit in (1, 7):
        _, deltas = subject.run(subject.collect(replace(ENDLESS, max_tokens=limit)))
        assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == ("length", limit)


def test_log_probabilities_are_those_of_the_tokens(subject: Subject) -> None:
    values = score(subject, "twin", IMAGE, completion="[[0.01, 0.0, -0.02, 1.0]]")
    assert len(values) > 10 and all(np.isfinite(values)) and all(value <= 0 for value in values)
    assert len(score(subject, None, IMAGE, completion="")) == 1  # the end of turn alone
    greedy = subject.text(replace(ASK, prompt="What is it?", adapter="twin", temperature=0.0, max_tokens=60))
    likely = score(subject, "twin", IMAGE, completion=greedy)
    unlikely = score(subject, "twin", IMAGE, completion=greedy[::-1])
    assert np.mean(likely) > np.mean(unlikely) + 0.5


def test_an_unknown_adapter_is_an_error(subject: Subject) -> None:
    with pytest.raises(ServerError):
        subject.text(replace(ASK, adapter="nobody"))
    with pytest.raises(ServerError):
        score(subject, "nobody", IMAGE)


def test_what_does_not_fit_is_refused_and_the_engine_lives_on(subject: Subject) -> None:
    with pytest.raises(PromptTooLong):
        subject.text(replace(ASK, prompt="\x01" * 6000))
    with pytest.raises(GrammarRefused):
        subject.text(replace(ASK, grammar="root ::= nowhere\n"))
    assert subject.run(subject.collect(replace(ASK, max_tokens=2)))[1][-1].finish_reason in ("length", "stop")
