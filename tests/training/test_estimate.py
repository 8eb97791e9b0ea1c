"""`estimate`: its counts against real files, its arithmetic against torch's own counter."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from qwen_model import write_qwen
from torch.utils.flop_counter import FlopCounterMode
from training_fakes import PICK, PLACE, episode_of
from transformers import AutoModelForImageTextToText

from vlm2vla_training.analysis.flops import model_size, named_preset, read_config, read_encoder, training_flops
from vlm2vla_training.cli import main
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.errors import UsageError
from vlm2vla_training.sft import Preset, lora_config

TWIN = Path(__file__).parents[2] / "models" / "twin" / "base"
GEMMA = Path(__file__).parent / "configs" / "gemma-3-12b-it.json"
QWEN = Path(__file__).parent / "configs" / "qwen3-vl-8b-instruct.json"


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    with EpisodeWriter(tmp_path / "episodes") as writer:
        for index in range(4):
            segments, text = (PICK, "pick up the carrot") if index % 2 else (PLACE, "put the carrot on the plate")
            writer.write(episode_of(segments, text, f"fake/{index}"))
    return tmp_path / "episodes"


def run(out: Path, episodes: Path, *more: str) -> dict[str, Any]:
    assert main(["estimate", "--episodes", str(episodes), "--out", str(out), *more]) == 0
    report: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return report


def test_counts_are_those_of_curate_and_sft(episodes: Path, tmp_path: Path) -> None:
    more = ["--base", str(TWIN), "--preset", "twin", "--gpus", "1", "--image-size", "112"]
    report = run(tmp_path / "estimate", episodes, *more)
    annotated, examples = tmp_path / "annotated", tmp_path / "examples"
    assert main(["annotate", "--episodes", str(episodes), "--out", str(annotated)]) == 0
    curate = ["curate", "--episodes", str(episodes), "--annotated", str(annotated), "--out", str(examples)]
    assert main([*curate, "--image-size", "112"]) == 0
    sft = ["sft", "--base", str(TWIN), "--examples", str(examples), "--out", str(tmp_path / "run"), "--threads", "1"]
    assert main([*sft, "--max-steps", "1", "--batch-size", "2", "--save-steps", "1"]) == 0

    curated = json.loads((examples / "summary.json").read_text())
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())
    train, disk = report["train"], report["disk_gb"]
    assert train["kinds"] == curated["examples"] and train["examples"] == curated["examples_total"]
    assert train["tokens_an_example"] == trained["tokens"]
    assert report["model"]["adapted_modules"] == trained["adapted_modules"]
    assert train["steps"] == -(-3 * train["examples"] // 32)
    assert disk["annotated"] * 1e9 == pytest.approx((annotated / "annotated.jsonl").stat().st_size, rel=1e-3)
    assert disk["base"] * 1e9 == pytest.approx((TWIN / "model.safetensors").stat().st_size * 2, rel=0.2)
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert disk["result"] * 1e9 == pytest.approx(adapter, rel=0.1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    kept = sum((checkpoint / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer.pt"))
    assert disk["checkpoints"] * 1e9 == pytest.approx(2 * kept, rel=0.15)
    written = sum(part.stat().st_size for part in examples.glob("part-*.parquet"))
    assert disk["examples"] * 1e9 == pytest.approx(written, rel=1e-3)


@pytest.mark.parametrize("changes", [{"rank": 1}, {"full": True}, {"rank": 1, "scope": "paper"}])
def test_operations_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    preset: Preset = dataclasses.replace(named_preset("twin"), **changes)
    config, encoder = read_config(TWIN), read_encoder(TWIN, 0)
    assert encoder is not None
    tokens = encoder.encode("Move to Carrot. " * 20, "[[0.01, 0.0, 0.0, 1.0]]", 1)
    ids = torch.tensor([[*tokens.prompt.tolist(), *tokens.answer.tolist()]])
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").train()
    if not preset.full:
        model = get_peft_model(model, lora_config(preset))
    size_px = config.vision_config.image_size
    with FlopCounterMode(display=False) as counter:
        types = (ids == encoder.processor.tokenizer.image_token_id).long()
        pixels = torch.zeros(1, 3, size_px, size_px)
        model(input_ids=ids, token_type_ids=types, pixel_values=pixels, labels=ids).loss.backward()
    ours = training_flops(model_size(config, preset, 0), preset, len(tokens), 1)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"full": True}, {"scope": "paper"}])
def test_operations_of_qwen_are_those_that_torch_counts(qwen: Path, changes: dict[str, Any]) -> None:
    preset: Preset = dataclasses.replace(named_preset("twin"), rank=1, **changes)
    config, encoder = read_config(qwen), read_encoder(qwen, 256)
    assert encoder is not None
    tokens = encoder.encode("Move to Carrot. " * 20, "[[0.01, 0.0, 0.0, 1.0]]", 2)
    ids = torch.tensor([[*tokens.prompt.tolist(), *tokens.answer.tolist()]])
    size = model_size(config, preset, 256)
    assert size.image_tokens == 64 and int((ids == config.image_token_id).sum()) == 128
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").train()
    if not preset.full:
        model = get_peft_model(model, lora_config(preset))
    if preset.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pictures = encoder.processor.image_processor([Image.new("RGB", (256, 256))] * 2, return_tensors="pt")
    with FlopCounterMode(display=False) as counter:
        types = (ids == config.image_token_id).long()
        model(input_ids=ids, mm_token_type_ids=types, labels=ids, **pictures).loss.backward()
    assert training_flops(size, preset, len(tokens), 2) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_the_published_qwen_and_pictures_that_it_cannot_see(
    episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--base", str(QWEN), "--preset", "qwen"]
    report = run(tmp_path / "out", episodes, *more, "--image-size", "448")
    model = report["model"]
    assert 8.6e9 < model["parameters"] < 8.9e9 and model["adapted_modules"] == 252 and not model["vision_trained"]
    assert (model["patches"], model["image_tokens"]) == (784, 196)
    command = ["estimate", "--episodes", str(episodes), "--out", str(tmp_path / "none"), *more]
    for size in ("0", "224", "450"):
        capsys.readouterr()
        code = main([*command, "--image-size", size])
        assert (code, "multiple of 32" in capsys.readouterr().err) == ((0, False) if size == "224" else (2, True))


def test_the_papers_model_and_a_data_set_of_the_papers_size(
    episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('["gemini-2.5-flash"]\ninput_usd = 0.3\noutput_usd = 2.5\n')
    more = ["--episodes-total", "60000", "--prices", str(prices), "--gpu-usd-per-hour", "2"]
    report = run(tmp_path / "out", episodes, "--base", str(GEMMA), "--requests-per-minute", "100", *more)
    model, annotate, train = report["model"], report["annotate"], report["train"]
    assert model["adapted_modules"] == 417 and 12.0e9 < model["parameters"] < 12.4e9
    usd = (annotate["prompt_tokens"] * 0.3 + annotate["output_tokens"] * 2.5) / 1e6
    assert annotate["usd"] == pytest.approx(usd, 1e-3)
    assert annotate["hours"] == pytest.approx(max(600, annotate["prompt_tokens"] / 1e6) / 60, abs=0.01)
    assert train["hours"] * 4 == pytest.approx(train["gpu_hours"], 1e-3)
    assert train["usd"] == pytest.approx(2 * train["gpu_hours"], 1e-3)
    assert train["gpu_hours"] == pytest.approx(train["flops"] / (312e12 * 0.35 * 3600), 1e-3)
    assert any("no tokenizer" in one for one in report["assumptions"])
    assert "GPU hours" in capsys.readouterr().out.splitlines()[-1]


def test_batch_mode_costs_what_the_table_says_and_promises_no_hours(
    episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('["gemini-2.5-flash"]\ninput_usd = 0.3\noutput_usd = 2.5\n')
    more = ["--base", str(TWIN), "--preset", "twin", "--batch"]
    command = ["estimate", "--episodes", str(episodes), "--out", str(tmp_path / "none"), *more]
    assert main(command) == 2 and "--prices" in capsys.readouterr().err
    assert main([*command, "--prices", str(prices)]) == 2 and "batch_input_usd" in capsys.readouterr().err
    prices.write_text(prices.read_text() + "batch_input_usd = 0.2\nbatch_output_usd = 1.5\n")
    annotate = run(tmp_path / "out", episodes, *more, "--prices", str(prices), "--episodes-total", "60000")["annotate"]
    usd = (annotate["prompt_tokens"] * 0.2 + annotate["output_tokens"] * 1.5) / 1e6
    assert annotate["usd"] == pytest.approx(usd, 1e-3) and annotate["batch"] and annotate["hours"] is None
    said = capsys.readouterr().out
    assert "USD, Batch mode (gemini-2.5-flash" in said and "24 hours" in said


def test_a_dry_run_writes_nothing(episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["estimate", "--episodes", str(episodes), "--base", str(TWIN), "--preset", "twin", "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0 and not out.exists()
    assert "nothing was written" in capsys.readouterr().out
    assert main([*command, "--gpus", "0"]) == 2 and "--gpus 0" in capsys.readouterr().err


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(UsageError, match="qwen2_vl; operations are counted for gemma3 and qwen3_vl"):
        read_config(tmp_path / "config.json")
