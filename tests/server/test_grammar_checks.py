"""bench/grammar_checks.py and its parts: random weights under the real xgrammar, and figures that tell the truth."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench_programs import program
from grammar_probe import Frame, agreement, random_generations
from PIL import Image
from server_fakes import ROWS_TEXT, FakeEngine, run
from tiny_models import IMAGE_SIZE, write_base

from vlm2vla_schema import prompts
from vlm2vla_schema.types import ModelCard
from vlm2vla_server.engines.base import GenerationRequest
from vlm2vla_server.engines.hf_model import ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine

PROMPT = prompts.actions_prompt("Move to Carrot", "Move forward and down.")
SUBTASKS = "['Move to Carrot', 'Grasp Carrot']"
VERDICT = '{"success": false, "confidence": "High", "reasoning": "It is not \\"there\\" yet."}'
SPACED = ROWS_TEXT.replace(", ", ",")
CARD = ModelCard(name="tiny", base_model="tiny", image_size=28)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("random") / "base")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with program("grammar_checks") as module:
        yield module


def write_examples(folder: Path, completions: dict[str, list[str]]) -> Path:
    """Examples as `vlm2vla-train curate` writes them, as far as the bench reads them."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 90, np.uint8)).save(buffer, "PNG")
    rows = [
        {
            "images": [buffer.getvalue()],
            "prompt": PROMPT,
            "completion": text,
            "kind": kind,
            "episode_key": "twin/test/0",
            "first": number,
        }
        for kind, texts in completions.items()
        for number, text in enumerate(texts)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    return folder


def ignore(_: int) -> None:
    """No progress is shown."""


def test_twenty_of_twenty_random_actions_parse(base: Path) -> None:
    async def work() -> dict[str, Any]:
        engine = TransformersEngine(ModelOptions(base, prefix_cache_entries=16))
        await engine.start()
        try:
            return await random_generations(engine, "actions", ModelCard.read(base), 20, 0, ignore)
        finally:
            await engine.close()

    found = run(work(), 150)
    assert (found["parsed"], found["cut"], found["refused"], found["failures"]) == (20, 0, 0, [])


def answers(free: list[str], constrained: list[str]) -> Callable[[GenerationRequest], str]:
    """What a model says with and without a grammar, in the order of the requests."""
    texts = {False: iter(free), True: iter(constrained)}
    return lambda request: next(texts[request.grammar is not None])


def test_equal_differing_and_broken_texts_are_told_apart() -> None:
    other = ROWS_TEXT.replace("0.01", "0.02")
    engine = FakeEngine(answer=answers([ROWS_TEXT, SPACED, other, "No."], [ROWS_TEXT] * 4))
    frames = [Frame(f"f{number}", np.zeros((28, 28, 3), np.uint8), PROMPT) for number in range(4)]
    found = run(agreement(engine, frames, CARD, "twin", ignore))
    assert (found["frames"], found["parseable"], found["equal"], found["share"]) == (4, 3, 1, 1 / 3)
    assert [(entry["frame"], entry["same_rows"]) for entry in found["differing"]] == [("f1", True), ("f2", False)]
    assert (found["same_rows"], found["constrained_parsed"]) == (2, 4)
    assert [entry["frame"] for entry in found["unparseable"]] == ["f3"]
    assert {(r.temperature, r.prompt, r.adapter, len(r.images)) for r in engine.requests} == {(0.0, PROMPT, "twin", 1)}
    assert (
        run(agreement(FakeEngine(answer=answers(["No."], [ROWS_TEXT])), frames[:1], CARD, None, ignore))["share"]
        is None
    )


def test_a_text_that_is_cut_or_refused_is_counted() -> None:
    engine = FakeEngine(texts=["[", ROWS_TEXT, "[[0.5, 0.0, 0.0, 1.0]]"])
    found = run(random_generations(engine, "actions", CARD, 3, 7, ignore))
    assert (found["parsed"], found["cut"], found["refused"]) == (1, 0, 2)
    assert [failure["seed"] for failure in found["failures"]] == [7, 9]
    cut = run(random_generations(FakeEngine(texts=["["], finish="length"), "actions", CARD, 1, 0, ignore))
    assert (cut["parsed"], cut["cut"], cut["refused"]) == (0, 1, 0)
    assert {(r.temperature, r.top_p, r.grammar is None) for r in engine.requests} == {(1.0, 1.0, False)}


def test_the_command_accepts_what_training_writes(
    bench: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    completions = {"actions": [ROWS_TEXT, ROWS_TEXT], "subtasks": [SUBTASKS], "verify": [VERDICT], "direction": ["up"]}
    examples, out = write_examples(tmp_path / "good", completions), tmp_path / "deep" / "figures.json"
    arguments = ["--model", str(base), "--examples", str(examples), "--out", str(out)]
    assert bench.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == figures and figures["missed"] == []
    actions = figures["examples"]["actions"]
    assert (actions["completions"], actions["distinct"], actions["accepted"], actions["parsed"]) == (2, 1, 2, 2)
    assert {kind: found["accepted"] for kind, found in figures["examples"].items()} == {
        "actions": 2,
        "subtasks": 1,
        "verify": 1,
    }
    frames = bench.actions_frames(examples, 5, IMAGE_SIZE)
    assert [frame.name for frame in frames] == ["twin/test/0#0", "twin/test/0#1"]
    assert frames[0].image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and frames[0].prompt == PROMPT


def test_the_command_reports_what_it_misses(bench: Any, base: Path, tmp_path: Path) -> None:
    bad = write_examples(tmp_path / "bad", {"actions": [SPACED, "[[0.5, 0.0, 0.0, 1.0]]", ROWS_TEXT]})
    out = tmp_path / "figures.json"
    assert bench.main(["--model", str(base), "--examples", str(bad), "--out", str(out)]) == 1
    figures = json.loads(out.read_text())
    actions = figures["examples"]["actions"]
    assert (actions["accepted"], actions["parsed"], len(figures["missed"])) == (1, 2, 2)
    assert [entry["text"] for entry in actions["refused"]] == [SPACED, "[[0.5, 0.0, 0.0, 1.0]]"]


def test_arguments_that_cannot_work_exit_with_two(bench: Any, base: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--frames", "3"], ["--random", "1", "--adapter", "x"], ["--random", "-1"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == 2
    assert bench.main(["--model", str(base), "--examples", str(tmp_path)]) == 2
    assert bench.main(["--random", "1", "--random-model", str(tmp_path / "nowhere")]) == 2
