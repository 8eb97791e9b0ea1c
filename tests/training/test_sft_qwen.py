"""Preset qwen on a random Qwen3-VL: what carries loss, what the model is given, a run from examples to an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_model import END_OF_TURN, IMAGE_PAD, IMAGE_SIZE, IMAGE_TOKENS, VIDEO_PAD, write_qwen
from safetensors.numpy import load_file
from training_fakes import PICK, PLACE, episode_of
from transformers import AutoModelForImageTextToText

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.bases import load_processor
from vlm2vla_training.cli import main
from vlm2vla_training.curation.dataset import ExampleSet, load_examples
from vlm2vla_training.curation.examples import KINDS
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import read_jsonl
from vlm2vla_training.sft_data import Collator, Encoder, check_parity, dump, encode_all

GOLDEN = Path(__file__).parent / "golden" / "loss_qwen.txt"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return Encoder(load_processor(base), IMAGE_SIZE)


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    with EpisodeWriter(root / "episodes") as writer:
        writer.write(episode_of(PLACE, "put the carrot on the plate", "fake/0", 0.001))
        writer.write(episode_of(PICK, "pick up the carrot", "fake/1", 0.001, 1))
    episodes = ["--episodes", str(root / "episodes")]
    assert main(["annotate", *episodes, "--out", str(root / "annotated")]) == 0
    curate = ["curate", *episodes, "--annotated", str(root / "annotated"), "--image-size", str(IMAGE_SIZE)]
    assert main([*curate, "--out", str(root / "examples")]) == 0
    return root / "examples"


@pytest.fixture(scope="module")
def examples(curated: Path) -> ExampleSet:
    return load_examples(curated, IMAGE_SIZE)


def collator_of(examples: ExampleSet, encoder: Encoder) -> Collator:
    return Collator(examples, encode_all(examples, encoder, 1024), encoder.processor)


def test_what_carries_loss_is_what_was_read_and_found_right(examples: ExampleSet, encoder: Encoder) -> None:
    assert set(examples.kinds) == set(KINDS)
    assert dump(examples, collator_of(examples, encoder), encoder, 1) == GOLDEN.read_text(encoding="utf-8")


def test_loss_is_on_the_answer_and_its_end_of_turn_and_never_on_a_picture(
    examples: ExampleSet, encoder: Encoder
) -> None:
    batch = collator_of(examples, encoder)([{"example": index} for index in range(len(examples))])
    ids, labels = batch["input_ids"], batch["labels"]
    picture = encoder.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    for row, completion in enumerate(examples.completions):
        carried = labels[row] != -100
        assert np.array_equal(labels[row][carried], ids[row][carried])
        text = encoder.tokenizer.decode(ids[row][carried].tolist(), skip_special_tokens=False)
        assert text == completion.strip() + END_OF_TURN
        assert (ids[row] == picture).sum() == IMAGE_TOKENS * len(examples.images[row])
    assert (labels[ids == picture] == -100).all() and (labels[batch["attention_mask"] == 0] == -100).all()
    assert np.array_equal(batch["mm_token_type_ids"] == 1, ids == picture) and "token_type_ids" not in batch
    pictures = sum(map(len, examples.images))
    assert batch["image_grid_thw"].tolist() == [[1, IMAGE_SIZE // 16, IMAGE_SIZE // 16]] * pictures
    assert batch["pixel_values"].shape == (pictures * 4 * IMAGE_TOKENS, 3 * 2 * 16 * 16)


def test_a_padded_batch_scores_each_example_as_if_it_were_alone(
    base: Path, examples: ExampleSet, encoder: Encoder
) -> None:
    """Positions on three axes, the order of grids, features of inner layers: all follow the example, not the batch."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    collator = collator_of(examples, encoder)
    places = [examples.kinds.index(kind) for kind in ("actions", "verify", "direction")]

    def answers(rows: list[int]) -> list[Any]:
        batch = {name: torch.from_numpy(array) for name, array in collator([{"example": i} for i in rows]).items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            scores = torch.log_softmax(model(**batch).logits, dim=-1)
        marked = [torch.nonzero(row != -100)[:, 0] for row in labels]
        return [scores[i, at - 1, labels[i, at]].numpy() for i, at in enumerate(marked)]

    for together, place in zip(answers(places), places, strict=True):
        (alone,) = answers([place])
        assert np.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("size", [64, 100, 128, 224])
def test_a_picture_costs_what_its_size_asks_for(base: Path, curated: Path, size: int) -> None:
    examples = load_examples(curated, size, ("verify",))
    encoder = Encoder(load_processor(base), size)
    picture = encoder.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    assert (encoder.encode("?", "yes", 2).prompt == picture).sum() == 2 * round(size / 32) ** 2
    check_parity(examples, collator_of(examples, encoder), encoder)


def test_tokens_and_pixels_are_those_of_the_processor(examples: ExampleSet, encoder: Encoder) -> None:
    check_parity(examples, collator_of(examples, encoder), encoder)
    blind = collator_of(examples, encoder)
    blind._kinds = ["token_type_ids"]
    with pytest.raises(DataError, match="attention differs"):
        check_parity(examples, blind, encoder)
    darker = collator_of(examples, encoder)
    darker._image_processor = load_processor(Path(encoder.tokenizer.name_or_path)).image_processor
    darker._image_processor.image_mean = [0.4, 0.5, 0.5]
    with pytest.raises(DataError, match="pixel values"):
        check_parity(examples, darker, encoder)


@pytest.mark.parametrize("token", [IMAGE_PAD, VIDEO_PAD])
def test_pictures_and_videos_are_no_words(encoder: Encoder, token: str) -> None:
    with pytest.raises(DataError, match=r"answer .* image token"):
        encoder.encode("what is this?", f"a {token}", 1)
    with pytest.raises(DataError, match=r"prompt .* image token"):
        encoder.encode(f"what is this {token}?", "a", 1)


def test_no_answer_is_trained_as_a_thought(tmp_path: Path, curated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    always, optional = write_qwen(tmp_path / "a", thinking="always"), write_qwen(tmp_path / "o", thinking="optional")
    with pytest.raises(UsageError, match="opens a thought"):
        Encoder(load_processor(always), IMAGE_SIZE)
    sft = ["sft", "--preset", "qwen", "--examples", str(curated), "--out", str(tmp_path / "run")]
    assert main([*sft, "--base", str(always)]) == 2 and "opens a thought" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    told = Encoder(load_processor(optional), IMAGE_SIZE)
    assert told.prompt_text("?", 0).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert told.tokenizer.decode(told.encode("?", "yes", 0).answer.tolist()) == "yes" + END_OF_TURN


@pytest.fixture(scope="module")
def run(base: Path, curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on a base as its maker ships it, without a card."""
    bare = tmp_path_factory.mktemp("maker") / "tiny-qwen3-vl"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("model_card.json"))
    out = bare.parent / "run"
    sft = ["sft", "--preset", "qwen", "--base", str(bare), "--examples", str(curated), "--out", str(out)]
    few = ["--learning-rate", "0.01", "--kinds", "direction", "--batch-size", "8", "--accumulation", "1"]
    assert main([*sft, *few, "--max-steps", "8", "--save-steps", "8", "--threads", "1", "--no-tensorboard"]) == 0
    return out


def test_a_run_learns_in_the_language_model_alone(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["adapted_modules"], summary["image_size"]) == (8, 7 * 4, IMAGE_SIZE)
    assert summary["preset"]["name"] == "qwen" and summary["base"] == "tiny-qwen3-vl"
    losses = [line["loss"] for line in read_jsonl(run / "log.jsonl") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 4 and all(".language_model." in name for name in tensors)
    assert all(np.abs(tensor).max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_export_writes_card_and_references(run: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert main(["export", "--run", str(run), "--out", str(out), "--name", "q"]) == 0
    card = ModelCard.read(out)
    assert (card.name, card.base_model, card.adapted_modules) == ("q", "tiny-qwen3-vl", 28)
    assert card.image_size == IMAGE_SIZE and card.base_hash == ModelCard.read(base).base_hash
    stop = load_processor(base).tokenizer.convert_tokens_to_ids(END_OF_TURN)
    assert card.reference_logprobs is not None and len(card.reference_logprobs) == 8
    for reference in card.reference_logprobs:
        assert reference.token_ids[-1] == stop and reference.logprobs != reference.base_logprobs
    assert not (out / "NOTICE").exists()  # Gemma's


def test_a_merged_model_keeps_every_part_of_its_processor(run: Path, base: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert main(["export", "--run", str(run), "--out", str(merged), "--format", "merged", "--dtype", "float32"]) == 0
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    ask = [load_processor(folder).apply_chat_template([{"role": "user", "content": "?"}]) for folder in (merged, base)]
    assert ask[0] == ask[1]
