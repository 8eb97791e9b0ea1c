from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from vlm2vla_schema import prompts
from vlm2vla_schema.types import ModelCard
from vlm2vla_training import twin_model
from vlm2vla_training.cli import main
from vlm2vla_training.cpu_attention import CPU_ATTENTION
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.pretrain import Run, spread_unmet
from vlm2vla_training.pretrain_batches import THINGS, Batcher, Stills, answer_vector, independent_turns
from vlm2vla_training.pretrain_command import HELD_OUT_SEED, build_parser, settings_from
from vlm2vla_training.pretrain_data import NAMES
from vlm2vla_training.pretrain_settings import Settings
from vlm2vla_training.twin_model import IMAGE_TOKENS
from vlm2vla_training.twin_tokenizer import ACTION_TOKENS, SPECIALS
from vlm2vla_twin.truth import Truth

TINY = ["--tower-steps", "2", "--steps", "2", "--batch", "2", "--tower-batch", "4", "--turns", "2", "--threads", "1"]
NEWLINES = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]
PLACES = {"gripper": (0.5, 0.5), "carrot": (0.3125, 0.6875), "card cat": (0.06, 0.94)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return twin_model.build_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "base"
    twin_model.save_base(twin_model.build_model(tokenizer, 3), tokenizer, folder, {"steps": 0}, {})
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run from the command line: 8 stills, 2 + 2 steps."""
    out = tmp_path_factory.mktemp("pretrain") / "run"
    assert main(["pretrain", "--out", str(out), "--render", "8", "--held-out", "4", *TINY]) == 0
    return out


def stills(count: int = 6) -> Stills:
    truths = [
        Truth((0.3, 0.0, 0.1), 1.0, None, {"carrot": (0.2 + 0.01 * i, 0.05, 0.014)}, {"cat": (0.3, 0.1, 0.0)}, PLACES)
        for i in range(count)
    ]
    pictures = np.random.default_rng(0).integers(0, 255, (count, 112, 112, 3), dtype=np.uint8)
    pixels = np.full((count, len(THINGS), 2), np.nan, dtype=np.float32)
    where = np.zeros((count, len(THINGS), 3), dtype=np.float32)
    for index, truth in enumerate(truths):
        for name, place in PLACES.items():
            pixels[index, THINGS.index(name)] = place
            where[index, THINGS.index(name)] = np.array(truth.position(name.removeprefix("card "))) * 10
    held = np.zeros((count, len(THINGS)), dtype=np.float32)
    held[:, 0], held[0, THINGS.index("carrot")] = 1.0, 1.0
    return Stills(pictures, truths, pixels, where, held)


# --- the tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "text",
    [
        prompts.subtasks_prompt("pick up the carrot"),
        prompts.motion_plan_prompt("Move to Carrot"),
        prompts.actions_prompt("Grasp Carrot", "Move down, then close the gripper."),
        prompts.verify_prompt("Grasp Carrot", "Lift Carrot"),
        prompts.verify_prompt("Lift Carrot", None),
        prompts.completion_prompt("Lift Carrot"),
        prompts.direction_prompt("Lift Carrot"),
        "[[0.05, -0.013, 0.0, 1.0], [0.0, 0.0, -0.05, 0.0]]",
        "  two  spaces, a\ttab and\r\na line",
        "".join(name for names in NAMES.values() for name in names),
        "emoji \U0001f955, Ünïcödé, кириллица, ▁",
        "\n".join(NEWLINES),
    ],
)
def test_text_comes_back_unchanged(tokenizer: Any, text: str) -> None:
    back = tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False)
    assert back == text.replace("▁", " ")


def test_digits_are_split_one_by_one(tokenizer: Any) -> None:
    pieces = tokenizer.convert_ids_to_tokens(encode(tokenizer, "0.0123456789, -120"))
    assert [piece for piece in pieces if any(letter.isdigit() for letter in piece)] == list("00123456789120")


def test_newlines_and_special_tokens_are_one_token_each(tokenizer: Any) -> None:
    for text in [*NEWLINES, *SPECIALS, *ACTION_TOKENS]:
        ids = encode(tokenizer, text)
        assert len(ids) == 1, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ACTION_TOKENS[0] == "<unused6133>" and ACTION_TOKENS[-1] == "<unused6142>" and len(set(ACTION_TOKENS)) == 10
    assert tokenizer.decode(encode(tokenizer, "a<end_of_turn>b\n\nc"), skip_special_tokens=True) == "ab\n\nc"


def test_a_whole_prompt_is_short(tokenizer: Any) -> None:
    assert len(encode(tokenizer, prompts.subtasks_prompt("pick up the carrot"))) < 20


def test_the_template_is_gemmas(tokenizer: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": " Where? "}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "here"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\n<start_of_image>Where?<end_of_turn>\n"
        "<start_of_turn>model\nhere<end_of_turn>\n<start_of_turn>model\n"
    )


# --- the model on disk


def test_a_saved_base_loads_and_speaks(base: Path) -> None:
    processor: Any = transformers.AutoProcessor.from_pretrained(base)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(base)
    picture = np.zeros((480, 640, 3), dtype=np.uint8)
    inputs = processor(text="<bos><start_of_image>Where?", images=[picture], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)
    soft = processor.tokenizer.convert_tokens_to_ids("<image_soft_token>")
    assert int((inputs["input_ids"] == soft).sum()) == IMAGE_TOKENS
    answer = model.generate(**inputs.to(model.dtype), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert (base / "model.safetensors").stat().st_size < 10_000_000
    card = ModelCard.read(base)
    assert (card.image_size, card.policy, card.adapter_scope) == (112, False, "none")


def test_the_picture_reaches_the_words(tokenizer: Any) -> None:
    model = twin_model.build_model(tokenizer, 0).eval()
    batch = Batcher(stills(), tokenizer, Settings(batch=2, text_rows=0, double_rows=0)).batch(0)
    tell: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": torch.ones_like(batch.input_ids),
        "token_type_ids": batch.image_mask.long(),
    }
    with torch.no_grad():
        one = model(pixel_values=batch.pictures, **tell).logits
        other = model(pixel_values=-batch.pictures, **tell).logits
    assert float((one - other).abs().max()) > 1e-3


def test_weights_follow_the_seed(tokenizer: Any) -> None:
    one, same, other = (twin_model.build_model(tokenizer, seed).get_input_embeddings().weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# --- the batches


def test_the_loss_falls_on_answers_only(tokenizer: Any) -> None:
    pairs = [("Where is the carrot?", "12.0 cm forward, 3.4 cm left"), ("What colour is the pan?", "black")]
    chat = Batcher(stills(), tokenizer, Settings()).chat(1, pairs)
    ids, labels = chat.ids, chat.labels
    assert len(ids) == len(labels) == len(chat.vectors) == len(chat.turns)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    told = [token for token in labels if token != -100]
    asked = [token for token, label in zip(ids, labels, strict=True) if label == -100]
    assert tokenizer.decode(told) == "12.0 cm forward, 3.4 cm left<end_of_turn>black<end_of_turn>"
    assert tokenizer.decode(asked) == (
        "<bos><start_of_turn>user\n\n\n<start_of_image>" + "<image_soft_token>" * IMAGE_TOKENS + "<end_of_image>\n\n"
        "Where is the carrot?<end_of_turn>\n<start_of_turn>model\n"
        "What colour is the pan?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_number_is_read_before_it_is_said(tokenizer: Any) -> None:
    chat = Batcher(stills(), tokenizer, Settings()).chat(1, [("Where?", "12.0 cm forward"), ("?", "no")])
    stated = [index for index, vector in enumerate(chat.vectors) if not np.isnan(vector[0])]
    assert tokenizer.decode([chat.ids[index] for index in stated]) == "<end_of_turn>\n<start_of_turn>model\n"
    assert chat.labels[stated[-1] + 1] != -100 and all(chat.labels[index] == -100 for index in stated)
    assert chat.vectors[stated[0]][0] == pytest.approx(1.2) and np.isnan(chat.vectors[stated[0]][1])


def test_turns_see_the_pictures_and_themselves_alone(tokenizer: Any) -> None:
    settings = Settings(batch=4, turns=3, double_rows=4, text_rows=0)
    batch = Batcher(stills(), tokenizer, settings).batch(1)
    seen, positions = independent_turns(batch)
    turns = batch.turns[0]
    second, third = (int((turns == turn).nonzero()[0, 0]) for turn in (2, 3))
    assert bool(seen[0, 0, second, turns == 0].all()), "the pictures"
    assert not bool(seen[0, 0, second, turns == 1].any()), "not the turn before"
    assert not bool(seen[0, 0, second, second + 1 :].any()), "nothing later"
    assert int(positions[0, second]) == int(positions[0, third]) == int((turns == 0).sum())
    image = batch.image_mask[0].nonzero()[:, 0]
    assert bool(seen[0, 0, image[0], image[IMAGE_TOKENS - 1]]), "a picture's tokens see one another"
    assert len(image) == 2 * IMAGE_TOKENS
    assert not bool(seen[0, 0, image[0], image[IMAGE_TOKENS]]), "but not those of a later picture"


@pytest.mark.parametrize(
    ("answer", "vector"),
    [
        ("[0.05, -0.013, 0.0]", (0.5, -0.13, 0.0)),
        ("3.0 cm backward, 4.5 cm left, 10.0 cm down", (-0.3, 0.45, -1.0)),
        ("7.2 cm", (np.nan, np.nan, 0.72)),
        ("yes", (np.nan, np.nan, np.nan)),
        ("a carrot, a pan", (np.nan, np.nan, np.nan)),
        ("", (np.nan, np.nan, np.nan)),
    ],
)
def test_the_vector_that_an_answer_states(answer: str, vector: tuple[float, float, float]) -> None:
    assert answer_vector(answer) == pytest.approx(vector, nan_ok=True)


def test_a_batch_is_a_function_of_its_step(tokenizer: Any) -> None:
    settings = Settings(batch=8, turns=3, double_rows=2, text_rows=2)
    batcher = Batcher(stills(), tokenizer, settings)
    batch, again, later = batcher.batch(4), Batcher(stills(), tokenizer, settings).batch(4), batcher.batch(5)
    assert torch.equal(batch.input_ids, again.input_ids) and torch.equal(batch.pictures, again.pictures)
    assert batch.input_ids.shape != later.input_ids.shape or not torch.equal(batch.input_ids, later.input_ids)
    assert len(batch.picks) == len(batch.pictures) == 8 - 2 + 2, "two texts without a picture, two pairs of pictures"
    assert int(batch.image_mask.sum()) == IMAGE_TOKENS * len(batch.picks)
    assert not bool((batch.labels[batch.image_mask] != -100).any())
    assert not bool((batch.labels[batch.input_ids == batcher.pad] != -100).any())
    assert bool((batch.labels != -100).any(dim=1).all())
    assert float(batch.pictures.min()) >= -1.0 and float(batch.pictures.max()) <= 1.0


def test_dense_targets_mark_the_patch_that_shows_the_thing() -> None:
    targets = stills().dense_targets(np.array([2, 0]))
    here = targets.here
    assert here.shape == (2, 64, len(THINGS)) and targets.values.shape == (2, IMAGE_TOKENS, 7)
    carrot = here[0, :, THINGS.index("carrot")].reshape(8, 8)
    assert carrot.nonzero().tolist() == [[5, 2]], "the centre of patch row 5, column 2"
    assert here[0, :, THINGS.index("gripper")].reshape(8, 8).nonzero().tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]
    assert here[0, :, THINGS.index("card cat")].reshape(8, 8).nonzero().tolist() == [[7, 0]]
    assert float(here[:, :, THINGS.index("plate")].sum()) == 0.0
    aside = targets.aside[0, 5 * 8 + 2, THINGS.index("carrot")]
    assert aside.tolist() == pytest.approx([0.0, 0.0], abs=1e-5), "in the middle of that patch"
    assert targets.aside[0, 4 * 8 + 4, 0].tolist() == pytest.approx([-0.5, -0.5]), "the gripper, up and to the left"
    slot = THINGS.index("carrot")
    shown, gripper = targets.values[0, slot], targets.values[0, THINGS.index("gripper"), 4:]
    assert shown[4:].tolist() == pytest.approx([2.2, 0.5, 0.14]), "the carrot's position in decimetres"
    assert shown[:3].tolist() == pytest.approx((shown[4:] - gripper).tolist(), abs=1e-5), "its offset from the gripper"
    assert targets.values[0, slot + len(THINGS)].tolist() == shown.tolist(), "the first things have a second slot"
    assert targets.digits[0, slot, 4].tolist() == [0, 2, 2, 0], "0.220 m: plus, 2, 2, 0"
    assert targets.held[:, slot].tolist() == [0.0, 1.0] and targets.held[:, 0].tolist() == [1.0, 1.0]
    assert bool(targets.there[0, slot]) and not bool(targets.there[0, THINGS.index("plate")])


# --- the run and its command


def test_a_run_leaves_model_log_and_summary(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["command"] == "pretrain" and summary["settings"]["steps"] == 2
    assert 1 <= summary["stills"] <= 8 and 1 <= summary["held_out"] <= 4
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3]
    assert "presence" in lines[0] and np.isfinite(lines[1]["language"])
    card = ModelCard.read(run_folder / "base")
    assert card.training["stills"] == summary["stills"] and card.policy is False


def test_training_and_held_out_seeds_are_disjoint(run_folder: Path) -> None:
    seeds = {}
    for name in ("train", "dev"):
        shards = sorted((run_folder / "stills" / name).glob("*.npz"))
        assert len(shards) == 1
        with np.load(shards[0]) as shard:
            first, count = (int(value) for value in shard["seeds"])
        seeds[name] = range(first, first + count)
    assert seeds == {"train": range(8), "dev": range(HELD_OUT_SEED, HELD_OUT_SEED + 4)}
    with pytest.raises(UsageError, match="held-out"):
        settings_from(build_parser().parse_args(["--out", "x", "--render", str(HELD_OUT_SEED + 1)]))


def test_the_same_command_again_trains_nothing_anew(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, weights = (run_folder / "log.jsonl").read_bytes(), (run_folder / "base" / "model.safetensors").read_bytes()
    shard = run_folder / "stills" / "train" / "stills-0000000.npz"
    before = shard.stat().st_mtime_ns
    assert main(["pretrain", "--out", str(run_folder), "--render", "8", "--held-out", "4", *TINY]) == 0
    assert (run_folder / "log.jsonl").read_bytes() == log
    assert (run_folder / "base" / "model.safetensors").read_bytes() == weights
    assert shard.stat().st_mtime_ns == before
    assert main(["pretrain", "--out", str(run_folder), *TINY, "--steps", "9"]) == 2
    assert "steps 2, now 9" in capsys.readouterr().err


def test_a_run_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    settings = Settings(tower_steps=2, steps=2, tower_batch=2, batch=2, turns=2, warmup=1, threads=1)
    run = Run(stills(), tmp_path, settings)
    for step in range(2):
        run.set_learning_rates(step)
        run.see(step)
    run.save(2)
    resumed = Run(stills(), tmp_path, settings)
    assert (run.start, resumed.start) == (0, 2)
    losses = []
    for each in (run, resumed):
        each.set_learning_rates(2)
        losses.append(each.speak(0))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(run.parameters, resumed.parameters, strict=True))


def test_the_tower_learns_alone_first_and_gently_after(tmp_path: Path) -> None:
    settings = Settings(tower_steps=2, steps=2, tower_batch=2, batch=2, turns=2, warmup=1, threads=1)
    run = Run(stills(), tmp_path, settings)
    rates = []
    for step in (0, 2):
        run.set_learning_rates(step)
        rates.append({group["name"]: group["lr"] for group in run.optimizer.param_groups})
    assert rates[0] == {"seeing": settings.tower_learning_rate, "speaking": 0.0}
    assert rates[1]["seeing"] == pytest.approx(settings.tower_share * rates[1]["speaking"])
    assert rates[1]["speaking"] == settings.learning_rate


def test_tokens_that_were_never_met_can_be_told_apart(tokenizer: Any) -> None:
    model = twin_model.build_model(tokenizer, 0)
    weights = model.get_input_embeddings().weight
    met = torch.zeros(len(weights), dtype=torch.bool)
    met[:100] = True
    with torch.no_grad():
        weights[100:] = 3.0 * weights[100] / weights[100].norm() + 0.01 * weights[100:]
    kept = weights[:100].detach().clone()
    spread_unmet(model, met, 5)
    assert torch.equal(weights[:100], kept)
    spread = torch.nn.functional.normalize(weights[100:].detach(), dim=1)
    alike = (spread @ spread.T).fill_diagonal_(0.0)
    assert float(alike.max()) < 0.8 and 0.3 < float(alike.mean()) < 0.5, "a common part, and one of their own"


def test_what_was_asked_counts_as_met_and_not_only_what_was_answered(tokenizer: Any, tmp_path: Path) -> None:
    run = Run(stills(), tmp_path, Settings(tower_steps=0, steps=1, batch=2, turns=2, warmup=1, threads=1))
    run.speak(0)
    batch = run.batcher.batch(0)
    asked = batch.input_ids[batch.labels == -100]
    assert bool(run.met[asked].all()) and int(run.met.sum()) == len(set(batch.input_ids.flatten().tolist()))


def test_attention_in_float32_is_attention(tokenizer: Any) -> None:
    model = twin_model.build_model(tokenizer, 0).eval()
    batch = Batcher(stills(), tokenizer, Settings(batch=2, text_rows=0, double_rows=0)).batch(0)
    tell = {
        "input_ids": batch.input_ids,
        "attention_mask": (batch.input_ids != 0).long(),
        "token_type_ids": batch.image_mask.long(),
        "pixel_values": batch.pictures,
    }
    with torch.no_grad():
        usual = model(**tell).logits
        model.set_attn_implementation(CPU_ATTENTION)
        assert torch.allclose(model(**tell).logits, usual, atol=1e-4)


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "--out", str(out), "--render", "8", "--dry-run"]) == 0
    assert main(["pretrain", "--out", str(out), "--random", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "8 stills" in said and "random weights" in said and not out.exists()


def test_random_weights_from_the_command_line(tmp_path: Path) -> None:
    assert main(["pretrain", "--out", str(tmp_path), "--random", "--seed", "3"]) == 0
    assert ModelCard.read(tmp_path / "base").training == {"steps": 0, "seed": 3}
    assert json.loads((tmp_path / "summary.json").read_text())["random"] is True


def test_missing_stills_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no stills"):
        Stills.load(tmp_path)
    assert main(["pretrain", "--out", str(tmp_path / "out"), "--stills", str(tmp_path), *TINY]) == 1
    assert "--render" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--batch", "--turns", "--threads", "--workers", "--held-out"])
def test_counts_below_one_are_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--out", str(tmp_path / "out"), option, "0"]) == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err


def test_the_commands_numbers_are_the_settings() -> None:
    assert settings_from(build_parser().parse_args(["--out", "x"])) == Settings()
    changed = settings_from(build_parser().parse_args(["--out", "x", "--seed", "4", "--turns", "9"]))
    assert changed == replace(Settings(), seed=4, turns=9)
