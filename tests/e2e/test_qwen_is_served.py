"""From a robot's log to a served adapter on another architecture, a random Qwen3-VL, which only the preset names. What
it answers means nothing; that answers are proven, parsed and read from the pictures does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qwen_model import IMAGE_SIZE, IMAGE_TOKENS, write_qwen
from server_fakes import GOOD, run, serving
from training_fakes import PICK, episode_of

from vlm2vla_server.app import create_app
from vlm2vla_server.engines.hf_model import ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine
from vlm2vla_server.settings import Settings
from vlm2vla_training.cli import main
from vlm2vla_training.episodes.parquet import EpisodeWriter

LONG = {"deadline_ms": 120_000, "max_attempts": 10}  # weights after three steps are nearly random: some plans are blank


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A base and the adapter that `sft --preset qwen` and `export` make for it."""
    root = tmp_path_factory.mktemp("qwen")
    base, adapter = write_qwen(root / "base"), root / "adapter"
    with EpisodeWriter(root / "episodes") as writer:
        writer.write(episode_of(PICK, "pick up the carrot", "fake/0", 0.001, 0))
    episodes = ["--episodes", str(root / "episodes")]
    assert main(["annotate", *episodes, "--out", str(root / "annotated")]) == 0
    curate = ["curate", *episodes, "--annotated", str(root / "annotated"), "--image-size", str(IMAGE_SIZE)]
    assert main([*curate, "--out", str(root / "examples")]) == 0
    sft = ["sft", "--preset", "qwen", "--base", str(base), "--examples", str(root / "examples")]
    few = ["--learning-rate", "0.01", "--max-steps", "3", "--threads", "1", "--no-tensorboard"]
    assert main([*sft, *few, "--out", str(root / "sft")]) == 0
    assert main(["export", "--run", str(root / "sft"), "--out", str(adapter), "--name", "mine"]) == 0
    yield base, adapter


def test_what_sft_trained_is_proven_and_answers_every_stage(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    settings = Settings(engine="transformers", model=base, adapters=(("mine", adapter),))
    engine = TransformersEngine(ModelOptions(base, settings.adapters))

    async def work() -> None:
        async with serving(create_app(settings, engine)) as caller:
            info = (await caller.get("/info")).json()
            (served,) = info["adapters"]
            assert info["ready"] and info["policy"] and served["proven"] and served["proof"] == "references"
            assert served["base_distance_nat"] > 3 * served["distance_nat"] and served["distance_nat"] < 0.02

            async def post(path: str, **more: Any) -> Any:
                answer = (await caller.post(path, {**GOOD[path], **LONG, **more})).json()
                assert answer.get("model") == "mine" and answer["policy"], answer
                return answer

            subtasks, plan = await post("/subtasks"), await post("/motion_plan", max_tokens=8)
            rows = await post("/actions")
            assert all(subtasks["subtasks"]) and all(len(row) == 4 for row in rows["actions"])
            # One picture for all, read once: every attempt but the very first finds it.
            found = [subtasks["attempts"] - 1, plan["attempts"], rows["attempts"]]
            cached = [answer["usage"]["cached_tokens"] for answer in (subtasks, plan, rows)]
            prefix = cached[2] // found[2]
            assert prefix > IMAGE_TOKENS and cached == [times * prefix for times in found]
            verdict = await post("/verify")
            assert isinstance(verdict["success"], bool) and verdict["usage"]["prompt_tokens"] > 2 * IMAGE_TOKENS

    run(work(), 240)
