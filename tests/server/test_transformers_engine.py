"""The transformers engine on a small random Gemma-3: constrained text, seeds, adapters, abort, prefix reuse."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from server_fakes import kill_thread, run, until
from tiny_models import IMAGE_SIZE, write_adapter, write_base

from vlm2vla_schema import grammar, parsing, prompts
from vlm2vla_schema.errors import ParseError
from vlm2vla_server.engines.base import (
    Delta,
    EngineStartError,
    GenerationError,
    GenerationRequest,
    GrammarRefused,
    PromptRefused,
    PromptTooLong,
    ScoreRequest,
    Turn,
)
from vlm2vla_server.engines.decoding import Detokenizer, pick_token
from vlm2vla_server.engines.hf_model import HFModel, ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine, device_is_lost

IMAGE = np.random.default_rng(1).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
OTHER = np.random.default_rng(2).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
REQUEST = GenerationRequest((IMAGE,), prompts.actions_prompt("Move", "Forward."), None, 1.0, 0.95, 3, 40)
PARSERS: dict[str, Any] = {
    "actions": (grammar.actions_grammar(), parsing.parse_actions),
    "subtasks": (grammar.subtasks_grammar(), parsing.parse_subtasks),
    "verdict": (grammar.verdict_grammar(), parsing.parse_verdict),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    root = tmp_path_factory.mktemp("models")
    base = write_base(root / "base")
    yield base, write_adapter(base, root / "one", 1), write_adapter(base, root / "two", 2)


@asynccontextmanager
async def started(folders: tuple[Path, Path, Path], **options: Any) -> AsyncIterator[TransformersEngine]:
    base, one, two = folders
    engine = TransformersEngine(replace(ModelOptions(base, (("one", one), ("my.two", two))), **options))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


async def collect(engine: TransformersEngine, request: GenerationRequest) -> tuple[str, Delta]:
    deltas = [delta async for delta in engine.generate(request)]
    assert [d.completion_tokens for d in deltas] == list(range(1, len(deltas) + 1))
    assert all(d.finish_reason is None for d in deltas[:-1])
    return "".join(d.text for d in deltas), deltas[-1]


def test_constrained_text_parses_whatever_the_weights_say(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            for seed in range(3):
                for name, (ebnf, parse) in PARSERS.items():
                    text, last = await collect(
                        engine,
                        replace(REQUEST, seed=seed, grammar=ebnf, max_tokens=2500, adapter=[None, "one"][seed % 2]),
                    )
                    assert last.finish_reason == "stop", name
                    parse(text)
            digits = {str(d): f"<unused{6133 + d}>" for d in range(10)}
            ebnf = grammar.actions_grammar(digit_map=digits)
            text, _ = await collect(engine, replace(REQUEST, grammar=ebnf, max_tokens=1500))
            assert "<unused6133>" in text and parsing.parse_actions(text, digit_map=digits).rows
            free, _ = await collect(engine, REQUEST)
            with pytest.raises(ParseError):
                parsing.parse_actions(free)

    run(work(), 120)


def test_a_seed_says_everything_and_greedy_needs_none(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            first, _ = await collect(engine, REQUEST)
            again, _ = await collect(engine, REQUEST)
            other, _ = await collect(engine, replace(REQUEST, seed=4))
            assert first == again != other
            greedy = [await collect(engine, replace(REQUEST, temperature=0.0, seed=s)) for s in (1, 2)]
            assert greedy[0][0] == greedy[1][0]

    run(work(), 60)


def test_every_request_chooses_its_adapter(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            names = [None, "one", "my.two", "one", None, "my.two"]
            scores = [await engine.score(ScoreRequest((IMAGE,), "What is it?", "a carrot", name)) for name in names]
            assert scores[0] == scores[4] and scores[1] == scores[3] and scores[2] == scores[5]
            assert scores[0] != scores[1] != scores[2] != scores[0]
            assert all(value < 0 for score in scores for value in score)
            info = engine.info()
            modules = 7 * engine._model.network.config.text_config.num_hidden_layers  # type: ignore[union-attr]  # started, so not None
            assert [(a.name, a.adapted_modules, a.problem) for a in info.adapters] == [
                ("one", modules, None),
                ("my.two", modules, None),
            ]
            base_only = TransformersEngine(ModelOptions(folders[0]))
            await base_only.start()
            assert await base_only.score(ScoreRequest((IMAGE,), "What is it?", "a carrot", None)) == scores[0]
            await base_only.close()

    run(work(), 60)


def test_the_picture_matters(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            one, other, none, both = [
                await engine.score(ScoreRequest(images, "What is it?", "a carrot", None))
                for images in ((IMAGE,), (OTHER,), (), (IMAGE, OTHER))
            ]
            assert one != other and none not in (one, other) and both not in (one, other)

    run(work(), 60)


def test_prefix_reuse_changes_nothing_but_the_time(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders, prefix_cache_entries=0) as plain, started(folders) as caching:
            plan = replace(REQUEST, prompt=prompts.motion_plan_prompt("Move"), adapter="one")
            for request in (plan, replace(REQUEST, adapter="one"), replace(REQUEST, adapter="my.two"), plan):
                expected, uncached = await collect(plain, request)
                text, _ = await collect(caching, request)
                assert text == expected and uncached.cached_tokens == 0
            # template head and image were read for the plan, and serve the rows; another adapter has its own
            assert [
                (await collect(caching, replace(REQUEST, adapter=a)))[1].cached_tokens > 16 for a in ("one", None)
            ] == [True, False]
            swapped = await collect(caching, replace(REQUEST, images=(OTHER,), adapter="one"))
            assert swapped[1].cached_tokens == 0
            score = ScoreRequest((IMAGE,), "What?", "a carrot", "one")
            assert await plain.score(score) == await caching.score(score) == await caching.score(score)

    run(work(), 120)


def test_reading_in_two_parts_agrees_with_transformers_own_forward(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            model: Any = engine._model
            prompt = model.encode((IMAGE, OTHER), replace(REQUEST, images=(IMAGE, OTHER)).conversation)
            assert int((prompt.ids == model.tokenizer.bos_token_id).sum()) == 1
            with model.using(None):
                ours, _, _ = model.prefill(prompt)
                whole = model.network(input_ids=prompt.ids, **prompt.kinds, **prompt.pictures, logits_to_keep=1)
            assert torch.allclose(ours, whole.logits[0, -1], atol=1e-4)

    run(work(), 60)


def test_closing_the_stream_frees_the_engine_within_one_token(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            endless = replace(REQUEST, grammar="root ::= [a-z]{3000}\n", max_tokens=3000)
            stream: Any = engine.generate(endless)
            for _ in range(5):
                await anext(stream)
            await stream.aclose()
            decoded = engine.load().decoded_tokens
            await until(lambda: engine.load().running == 0)
            assert engine.load().decoded_tokens <= decoded + 1
            # one that waits in the queue and is abandoned never runs
            busy: Any = engine.generate(endless)
            await anext(busy)
            waiting: Any = engine.generate(endless)
            task = asyncio.ensure_future(anext(waiting))
            await until(lambda: engine.load().waiting == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await busy.aclose()
            await until(lambda: engine.load().running == 0 and engine.load().waiting == 0)
            assert (await collect(engine, replace(REQUEST, max_tokens=2)))[1].completion_tokens == 2

    run(work(), 60)


def test_closing_the_engine_ends_everything(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            stream: Any = engine.generate(replace(REQUEST, grammar="root ::= [a-z]{3000}\n", max_tokens=3000))
            await anext(stream)
            await engine.close()
            with pytest.raises(GenerationError):
                while True:
                    await anext(stream)
            with pytest.raises(GenerationError):
                await collect(engine, REQUEST)

    run(work(), 60)


def test_a_killed_thread_is_a_dead_engine(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            dead = asyncio.create_task(engine.wait_dead())
            stream: Any = engine.generate(replace(REQUEST, grammar="root ::= [a-z]{3000}\n", max_tokens=3000))
            await anext(stream)
            kill_thread("vlm2vla-engine")
            with pytest.raises(GenerationError):
                while True:
                    await anext(stream)
            assert "SystemExit" in await asyncio.wait_for(dead, 10)
            with pytest.raises(GenerationError):
                await collect(engine, REQUEST)

    run(work(), 60)


def test_a_lost_device_is_fatal_and_full_memory_is_not() -> None:
    def failed(cause: Exception) -> GenerationError:
        problem = GenerationError("the model failed")
        problem.__cause__ = cause
        return problem

    assert device_is_lost(failed(torch.AcceleratorError("CUDA error: device-side assert triggered")))
    assert not device_is_lost(failed(torch.OutOfMemoryError("CUDA out of memory")))
    assert not device_is_lost(failed(ValueError("anything")))


def test_what_does_not_fit_the_context_is_refused(folders: tuple[Path, Path, Path]) -> None:
    async def work() -> None:
        async with started(folders) as engine:
            with pytest.raises(PromptTooLong):
                await collect(engine, replace(REQUEST, prompt="\x01" * 6000))
            with pytest.raises(GrammarRefused):
                await collect(engine, replace(REQUEST, grammar="root ::= nowhere\n"))
            assert (await collect(engine, replace(REQUEST, max_tokens=2)))[1].finish_reason in ("length", "stop")

    run(work(), 60)


def test_adapters_that_do_not_fit_are_noticed(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, one, _ = folders
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    (renamed / "adapter_config.json").write_bytes((one / "adapter_config.json").read_bytes())
    weights = load_file(one / "adapter_model.safetensors")
    save_file(
        {k.replace("language_model.", "language_model.model."): v for k, v in weights.items()},
        renamed / "adapter_model.safetensors",
    )

    async def work() -> None:
        engine = TransformersEngine(ModelOptions(base, (("one", one), ("renamed", renamed))))
        await engine.start()
        good, bad = engine.info().adapters
        assert good.problem is None and "match no module" in str(bad.problem)
        await engine.close()
        for broken in (
            {"adapter_config.json": b"{}"},
            {"adapter_model.safetensors": b"junk"},
            {"adapter_config.json": b"{"},
        ):
            for name, content in broken.items():
                (renamed / name).write_bytes(content)
            engine = TransformersEngine(ModelOptions(base, (("x", renamed),)))
            with pytest.raises(EngineStartError):
                await engine.start()
            await engine.close()

    run(work(), 60)


def test_top_p_keeps_the_smallest_sufficient_set_and_top_k_is_off() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    seen = {pick_token(logits, 1.0, 0.8, generator) for _ in range(300)}
    assert seen == {0, 1}
    assert {pick_token(logits, 1.0, 1.0, generator) for _ in range(500)} == {0, 1, 2, 3}
    assert {pick_token(logits, 0.0, 0.1, generator) for _ in range(10)} == {0}
    flat = torch.zeros(500)
    assert len({pick_token(flat, 1.0, 1.0, generator) for _ in range(3000)}) > 400
    masked = torch.full((5,), float("-inf"))
    masked[3] = 0.0
    assert {pick_token(masked, 2.0, 0.95, generator) for _ in range(20)} == {3}


def test_pieces_of_text_join_to_the_whole(folders: tuple[Path, Path, Path]) -> None:
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folders[0])
    for text in (
        "Move forward, slightly left.",
        "拿起胡萝卜 · गाजर उठाओ",
        "  [[0.01, -0.2]]\n\n",
        "naïve 🥕 <unused6135>",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        detokenizer = Detokenizer(tokenizer, frozenset())
        pieces = [detokenizer.push(i) for i in ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_conversation_goes_through_the_models_own_template(folders: tuple[Path, Path, Path]) -> None:
    model = HFModel(ModelOptions(folders[0]))
    turns = (Turn("user", (None, "Here?")), Turn("assistant", ("No.",)), Turn("user", ("And here?", None)))
    prompt = model.encode([IMAGE, OTHER], turns)
    text = model.tokenizer.decode(prompt.ids[0], clean_up_tokenization_spaces=False)
    text = re.sub(r"\n\n<start_of_image>(\s*<image_soft_token>)+\s*<end_of_image>\n\n", "[image]", text)
    assert text == (
        "<bos><start_of_turn>user\n[image]Here?<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n"
        "<start_of_turn>user\nAnd here?[image]<end_of_turn>\n<start_of_turn>model\n"
    )
    pixels = prompt.pictures["pixel_values"]
    assert not torch.equal(pixels[0], pixels[1])
    swapped = model.encode([OTHER, IMAGE], turns)
    assert torch.equal(swapped.pictures["pixel_values"][0], pixels[1])
    model.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptRefused, match="chat template"):
        model.encode([], turns[1:2])
