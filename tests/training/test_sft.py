import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from training_fakes import PICK, episode_of

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.cli import main
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.sft import PRESETS, load_base
from vlm2vla_training.twin_model import write_random_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_random_base(folder)
    return folder


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    with EpisodeWriter(root / "episodes") as writer:
        for index in range(3):
            writer.write(episode_of(PICK, "pick up the carrot", f"fake/{index}", 0.001, index))
    assert main(["annotate", "--episodes", str(root / "episodes"), "--out", str(root / "annotated")]) == 0
    common = ["curate", "--episodes", str(root / "episodes"), "--annotated", str(root / "annotated")]
    assert main([*common, "--image-size", "112", "--out", str(root / "examples")]) == 0
    return root / "examples"


def linears(base: Path) -> int:
    """Seven linears a language layer."""
    return 7 * int(json.loads((base / "config.json").read_text())["text_config"]["num_hidden_layers"])


def sft(base: Path, curated: Path, out: Path, *more: str) -> int:
    few = ["--kinds", "actions,completion", "--batch-size", "2", "--warmup-steps", "1", "--threads", "1"]
    steps = ["--max-steps", "4", "--save-steps", "2"]
    return main(["sft", "--base", str(base), "--examples", str(curated), "--out", str(out), *few, *steps, *more])


@pytest.fixture(scope="module")
def run(base: Path, curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "run"
    assert sft(base, curated, out) == 0
    return out


def test_a_run_leaves_adapter_log_and_summary(base: Path, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["variant"]) == (4, "main")
    assert summary["adapted_modules"] == linears(base)
    assert set(summary["kinds"]) == {"actions", "completion"}
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 4
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * linears(base) and all("language_model" in name for name in tensors)
    assert any(np.abs(tensor).max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_resuming_from_a_checkpoint_gives_the_same_adapter(
    base: Path, curated: Path, run: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "run"
    killed.mkdir()
    shutil.copytree(run / "checkpoint-2", killed / "checkpoint-2")
    shutil.copyfile(run / "run.json", killed / "run.json")
    assert sft(base, curated, killed) == 0
    straight, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, killed))
    assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def test_after_kill_9_the_losses_are_those_of_an_uninterrupted_run(base: Path, curated: Path, tmp_path: Path) -> None:
    often = ["--max-steps", "8", "--save-steps", "1", "--held-out", "0.34", "--no-tensorboard"]
    assert sft(base, curated, tmp_path / "straight", *often) == 0
    killed, few = tmp_path / "killed", ["--kinds", "actions,completion", "--batch-size", "2", "--warmup-steps", "1"]
    command = [sys.executable, "-m", "vlm2vla_training.cli", "sft", "--base", str(base), "--examples", str(curated)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, "--out", str(killed), "--threads", "1", *few, *often], env=environment)
    try:
        limit_s = time.monotonic() + 240
        while not (killed / "checkpoint-3").exists() and process.poll() is None and time.monotonic() < limit_s:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL and not (killed / "summary.json").exists()
    assert sft(base, curated, killed, *often) == 0
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        values = [
            [(line["step"], line[key]) for line in map(json.loads, (folder / "log.jsonl").open()) if key in line]
            for folder in (tmp_path / "straight", killed)
        ]
        assert values[0] == values[1] and len(values[0]) >= 8, key
    straight, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "killed"))
    assert straight["loss"] == resumed["loss"] and straight["held_out_loss"] == resumed["held_out_loss"] > 0
    assert straight["held_out_examples"] > 0


def test_what_carries_loss_is_written_for_people_and_losses_for_tensorboard(
    base: Path, curated: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert sft(base, curated, tmp_path / "run", "--dump", "2", "--max-steps", "1", "--no-tensorboard") == 0
    text = (tmp_path / "run" / "loss.txt").read_text()
    assert text.count("\n--- actions of") + text.count("--- completion of") + text.startswith("--- actions") == 4
    assert "<end_of_turn>]]]" in text and not (tmp_path / "run" / "tensorboard").exists()
    capsys.readouterr()
    assert sft(base, curated, tmp_path / "dry", "--dump", "2", "--dry-run") == 0 and text in capsys.readouterr().out


def test_an_adapter_that_reaches_into_the_tower_is_exported_only_on_demand(
    base: Path, curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(base, curated, tmp_path / "run", "--scope", "paper", "--max-steps", "1") == 0
    tower = int(json.loads((base / "config.json").read_text())["vision_config"]["num_hidden_layers"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["adapted_modules"] == linears(base) + 3 * tower
    export = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--no-references"]
    assert main(export) == 2 and "vLLM" in (reason := capsys.readouterr().err) and "--format merged" in reason
    assert main([*export, "--unservable"]) == 0
    assert (
        ModelCard.read(tmp_path / "adapter").adapter_scope == "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj,gate_proj"
    )
    assert "not with vLLM" in (tmp_path / "adapter" / "README.md").read_text()
    assert main([*export, "--format", "merged"]) == 0  # merged weights have no scope
    assert "adapter merged into its base" in (tmp_path / "adapter" / "README.md").read_text()
    assert ModelCard.read(tmp_path / "adapter").reference_logprobs is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--preset", "at"], "variant 'at'"),
        (["--preset", "qwen"], "qwen3_vl"),
        (["--preset", "qlora"], "CUDA"),
        (["--held-out", "0.01"], "leaves one side empty"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    base: Path, curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert sft(base, curated, tmp_path / "run", *options) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_another_setting_in_the_same_folder_is_refused(
    base: Path, curated: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(base, curated, run, "--learning-rate", "0.5") == 2
    assert "preset" in capsys.readouterr().err


def test_an_example_that_is_too_long_stops_the_run(
    base: Path, curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(base, curated, tmp_path / "run", "--max-tokens", "50") == 1
    assert "exceed 50 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(base: Path, curated: Path, tmp_path: Path) -> None:
    assert sft(base, curated, tmp_path / "run", "--dry-run") == 0
    assert not (tmp_path / "run").exists()


def test_export_writes_an_artifact_without_paths(base: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert main(["export", "--run", str(run), "--out", str(out), "--name", "tiny"]) == 0
    card = ModelCard.read(out)
    assert (card.name, card.adapted_modules, card.policy, card.representation) == ("tiny", linears(base), True, "text")
    assert card.base_model == "twin-base" and card.data_hash
    assert card.reference_logprobs is not None and len(card.reference_logprobs) == 8
    for reference in card.reference_logprobs:
        assert len(reference.logprobs) == len(reference.token_ids) == len(reference.base_logprobs) > 0
        assert reference.logprobs != reference.base_logprobs and max(reference.logprobs) <= 0
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "twin-base"
    assert str(run.parent) not in "".join(path.read_text() for path in out.glob("*.json"))


def test_what_was_never_trained_to_act_is_no_policy(run: Path, tmp_path: Path) -> None:
    judge = tmp_path / "run"
    shutil.copytree(run, judge)
    summary = json.loads((judge / "summary.json").read_text())
    (judge / "summary.json").write_text(json.dumps({**summary, "kinds": {"verify": 8}}))
    assert main(["export", "--run", str(judge), "--out", str(tmp_path / "out"), "--no-references"]) == 0
    assert not ModelCard.read(tmp_path / "out").policy


def test_references_can_be_added_to_an_exported_adapter(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, again = tmp_path / "old", ["export", "--adapter", str(tmp_path / "old"), "--out", str(tmp_path / "old")]
    assert main(["export", "--run", str(run), "--out", str(old), "--name", "tiny", "--no-references"]) == 0
    without = ModelCard.read(old)
    assert without.reference_logprobs is None
    assert main(again) == 2 and "--base" in capsys.readouterr().err
    assert main([*again, "--base", str(base), "--dry-run"]) == 0 and ModelCard.read(old) == without
    assert main([*again, "--base", str(base)]) == 0
    card = ModelCard.read(old)
    assert card.reference_logprobs and card.model_copy(update={"reference_logprobs": None}) == without
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "new"), "--name", "tiny"]) == 0
    assert ModelCard.read(tmp_path / "new").reference_logprobs == card.reference_logprobs
    other = tmp_path / "other"
    write_random_base(other, seed=1)
    assert main([*again, "--base", str(other)]) == 2 and "hash" in capsys.readouterr().err


def test_full_fine_tune_is_a_whole_model(
    base: Path, curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft(base, curated, tmp_path / "run", "--full-finetune", "--max-steps", "1") == 0
    export = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model"), "--name", "full"]
    assert main([*export, "--format", "adapter"]) == 2 and "no adapter" in capsys.readouterr().err
    assert main([*export, "--dtype", "float32"]) == 0  # one step changes less than bfloat16 rounds away
    card = ModelCard.read(tmp_path / "model")
    assert (card.adapter_scope, card.adapted_modules) == ("full", 0)
    assert card.reference_logprobs and card.metrics["stored_weights"]["distance_nat"] < 1e-3
    assert (tmp_path / "model" / "config.json").exists() and (tmp_path / "model" / "tokenizer.json").exists()


def test_a_full_fine_tune_in_bfloat16_loses_no_small_update(
    base: Path, curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adding 1e-5 to a weight of 0.02 changes nothing in bfloat16: one process trains float32, ZeRO its own copies."""
    preset = PRESETS["full_finetune"]
    assert preset.weights == "bfloat16" and load_base(base, preset).dtype == torch.float32
    assert load_base(base, PRESETS["servable"]).dtype == torch.bfloat16
    assert sft(base, curated, tmp_path / "run", "--preset", "full_finetune", "--max-steps", "1") == 0
    with safe_open(tmp_path / "run/model/model.safetensors", "pt") as stored:
        names = stored.keys()
        assert {stored.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert load_base(base, preset).dtype == torch.bfloat16


def test_a_run_goes_on_from_an_exported_adapter(
    base: Path, curated: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "start"
    assert main(["export", "--run", str(run), "--out", str(start), "--no-references", "--dtype", "float32"]) == 0
    still = ["--adapter", str(start), "--learning-rate", "1e-12", "--max-steps", "1", "--save-steps", "1"]
    assert sft(base, curated, tmp_path / "on", *still) == 0
    before, after = (load_file(f / "adapter_model.safetensors") for f in (start, tmp_path / "on/adapter"))
    assert before.keys() == after.keys()
    assert all(np.allclose(before[name], after[name], atol=1e-7) for name in before), "its weights are the beginning"
    assert sft(base, curated, tmp_path / "on", *still) == 0, "the same command resumes"
    moved = ["--adapter", str(start), "--max-steps", "1", "--warmup-steps", "0"]
    assert sft(base, curated, tmp_path / "moved", *moved) == 0
    changed = load_file(tmp_path / "moved/adapter/adapter_model.safetensors")
    assert any(not np.allclose(before[name], changed[name], atol=1e-5) for name in before), "and it is trained"
    assert sft(base, curated, tmp_path / "on", "--max-steps", "1", "--save-steps", "1", "--learning-rate", "1e-12") == 2
    assert "continued_from" in capsys.readouterr().err
    assert main(["export", "--run", str(tmp_path / "on"), "--out", str(tmp_path / "end"), "--no-references"]) == 0
    told = ModelCard.read(tmp_path / "end").training["continued_from"]
    assert told["name"] == ModelCard.read(start).name and len(told["weights_hash"]) == 64


def test_an_adapter_that_does_not_fit_is_not_continued(
    base: Path, curated: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, other = tmp_path / "start", tmp_path / "other"
    assert main(["export", "--run", str(run), "--out", str(start), "--no-references"]) == 0
    write_random_base(other, seed=1)
    for more, reason in (
        (["--rank", "8"], "rank 16, not 8"),
        (["--scope", "all_linear"], "its scope"),
        (["--full-finetune"], "full fine-tune"),
    ):
        assert sft(base, curated, tmp_path / "run", "--adapter", str(start), *more) == 2
        assert reason in capsys.readouterr().err
    assert sft(other, curated, tmp_path / "run", "--adapter", str(start)) == 2
    assert "its base_hash" in capsys.readouterr().err and not (tmp_path / "run").exists()
