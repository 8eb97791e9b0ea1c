"""From a robot's log to a served policy, every part real: annotate, curate, sft, export, a server that proves it."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_fakes import GOOD, run, serving
from training_fakes import PICK, episode_of

from vlm2vla_server.app import create_app
from vlm2vla_server.engines.hf_model import ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine
from vlm2vla_server.settings import Settings
from vlm2vla_training.cli import main
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.jsonio import read_jsonl

BASE = Path(__file__).parents[2] / "models" / "twin" / "base"


@pytest.mark.timeout(600)
def test_what_sft_trained_on_two_cores_is_proven_and_acts(tmp_path: Path) -> None:
    with EpisodeWriter(tmp_path / "episodes") as writer:
        writer.write(episode_of(PICK, "pick up the carrot", "fake/0", 0.001, 0))
    episodes, annotated = ["--episodes", str(tmp_path / "episodes")], ["--annotated", str(tmp_path / "annotated")]
    assert main(["annotate", *episodes, "--out", str(tmp_path / "annotated")]) == 0
    examples, trained, adapter = tmp_path / "examples", tmp_path / "sft", tmp_path / "adapter"
    assert main(["curate", *episodes, *annotated, "--image-size", "112", "--out", str(examples)]) == 0
    sft = ["sft", "--base", str(BASE), "--examples", str(examples), "--out", str(trained), "--preset", "twin"]
    few = ["--batch-size", "4", "--max-steps", "20", "--warmup-steps", "2", "--threads", "1", "--no-tensorboard"]
    assert main([*sft, *few]) == 0
    losses = [line["loss"] for line in read_jsonl(trained / "log.jsonl") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert main(["export", "--run", str(trained), "--out", str(adapter), "--name", "mine"]) == 0

    settings = Settings(engine="transformers", model=BASE, adapters=(("mine", adapter),))
    engine = TransformersEngine(ModelOptions(BASE, settings.adapters))

    async def work() -> None:
        async with serving(create_app(settings, engine)) as caller:
            info = (await caller.get("/info")).json()
            (served,) = info["adapters"]
            assert info["ready"] and info["policy"] and served["proven"] and served["proof"] == "references"
            assert served["base_distance_nat"] > 3 * served["distance_nat"]
            answer = (await caller.post("/actions", {**GOOD["/actions"], "deadline_ms": 60_000})).json()
            assert answer["model"] == "mine" and answer["policy"] and len(answer["actions"][0]) == 4

    run(work(), 240)
