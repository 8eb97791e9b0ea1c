"""bench/training_step.py: that it trains what `sft` would, and that its figures follow from one another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_programs import program
from transformers import AutoModelForImageTextToText

from vlm2vla_training.analysis.flops import model_size, named_preset

ROOT = Path(__file__).resolve().parents[2]
TWIN = ROOT / "models" / "twin" / "base"


@pytest.fixture
def bench() -> Iterator[Any]:
    with program("training_step") as module:
        yield module


def weights_a_token_passes(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    linears = [one for one in model.model.language_model.modules() if isinstance(one, torch.nn.Linear)]
    return sum(one.weight.numel() for one in [*linears, model.lm_head])


@pytest.mark.parametrize(("preset", "adapted"), [("paper", 2 * 7 + 2 * 3), ("full_finetune", 0)])
def test_a_step_is_trained_and_its_figures_agree(bench: Any, tmp_path: Path, preset: str, adapted: int) -> None:
    out = tmp_path / "deep" / "step.json"
    options = ["--length", "48", "--answer", "8", "--steps", "2", "--warm-up", "1", "--layers", "2"]
    command = ["--config", str(TWIN), "--preset", preset, *options, "--peak-tflops", "0.5", "--out", str(out)]
    assert bench.main(command) == 0
    found = json.loads(out.read_text())
    assert (found["layers"], found["adapted_modules"], len(found["steps_s"])) == (2, adapted, 2)
    assert found["tokens_a_step"] == 2 * 48 and found["gradient_checkpointing"]  # accumulation 2
    config = bench.read_cut(TWIN, 2)
    guess = math.log(config.text_config.vocab_size)  # random weights know nothing
    assert len(found["losses"]) == 3 and found["losses"][0] == pytest.approx(guess, 0.05)
    linears = weights_a_token_passes(config)
    usual = 6 * linears if preset == "full_finetune" else 4 * linears + 6 * found["trained"]
    assert found["model_flops_a_token"] == usual < found["all_flops_a_token"]
    assert found["tokens_a_second"] == pytest.approx(96 / found["seconds_a_step"])
    assert found["tflops"] == pytest.approx(usual * found["tokens_a_second"] / 1e12)
    assert found["share_of_peak"] == pytest.approx(found["tflops"] / 0.5)
    assert found["peak_gb"] > found["parameters"] * 2 / 1e9


def test_pictures_stand_in_front_and_only_the_answer_carries_loss(bench: Any) -> None:
    config = bench.read_cut(TWIN, None)
    batch = bench.RandomBatches(config, 60, 2, 10)([{"example": 0}, {"example": 1}])
    soft = batch["input_ids"] == config.image_token_id
    assert soft.sum(axis=1).tolist() == [32, 32] and soft[:, :32].all()
    assert np.array_equal(batch["token_type_ids"], soft) and batch["input_ids"].max() < config.text_config.vocab_size
    carried = batch["labels"] != -100
    assert not (carried & soft).any() and carried.sum(axis=1).tolist() == [10, 10]
    assert batch["pixel_values"].shape == (4, 3, 112, 112)
    with pytest.raises(SystemExit, match="at least 43"):
        bench.RandomBatches(config, 42, 2, 10)


def test_the_papers_model_by_the_usual_count(bench: Any) -> None:
    preset = named_preset("paper")
    size = model_size(bench.read_cut(bench.GEMMA, None), preset, 896)
    # 11.8e9 weights that a token passes, frozen; the adapter's 66e6 with their own gradients.
    assert bench.flops_a_token(size, False) == pytest.approx(4 * 11.77e9 + 6 * size.trained, 1e-3)
    assert bench.flops_a_token(size, True) == pytest.approx(6 * 11.77e9, 1e-3)
