"""Every answer that the base model is trained on is read back and compared with the truth it was made from."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from vlm2vla_schema.directions import IGNORED_BELOW_M
from vlm2vla_schema.directions import NAMES as AXES
from vlm2vla_training import pretrain_data
from vlm2vla_training.pretrain_data import COLOURS, HOVER_M, NAMES, conversation, random_scene, user_text
from vlm2vla_training.twin_tokenizer import prompt_texts
from vlm2vla_twin.scene import CARDS, KINDS
from vlm2vla_twin.truth import ALIGNED_M, HOVER_RANGE_M, LIFTED_M, Truth

THING = {name.lower(): thing for thing, names in NAMES.items() for name in names} | {f"{c} card": c for c in CARDS}
SIGNED = {word: (axis, sign) for axis, pair in enumerate(AXES) for word, sign in zip(pair, (1, -1), strict=True)}
HALF_UNIT_M = 0.5e-3 + 1e-9


def random_truth(rng: np.random.Generator) -> Truth:
    def spot(z: float) -> tuple[float, float, float]:
        return (float(rng.uniform(0.17, 0.42)), float(rng.uniform(-0.19, 0.21)), z)

    objects = [str(name) for name in rng.choice(list(KINDS), int(rng.integers(1, 7)), replace=False)]
    cards = [str(name) for name in rng.choice(CARDS, int(rng.integers(0, 3)), replace=False)]
    held = next((name for name in objects if KINDS[name].graspable and rng.random() < 0.3), None)
    gripper = spot(float(rng.uniform(0.01, 0.22)))
    return Truth(
        gripper,
        float(rng.uniform(0.0, 1.0)),
        held,
        {name: gripper if name == held else spot(KINDS[name].rest_z_m) for name in objects},
        {name: spot(0.0) for name in cards},
        {},
    )


def thing(text: str) -> str:
    return THING[text.lower()]


def centimetres(answer: str) -> list[float]:
    """Metres along x, y, z as the answer states them."""
    found = [float("nan")] * 3
    for part in answer.split(", "):
        match = re.fullmatch(r"(\d+\.\d) cm (\w+)", part)
        assert match, answer
        axis, sign = SIGNED[match[2]]
        found[axis] = sign * float(match[1]) / 100
    return found


def check_numbers(truth: Truth, question: str, answer: str) -> str | None:
    if match := re.fullmatch(r"How far is the (.+) from the gripper\?", question):
        assert centimetres(answer) == pytest.approx(truth.offset(thing(match[1])), abs=HALF_UNIT_M)
        return "offset_cm"
    if match := re.fullmatch(r"Offset in metres from the gripper to the point above the (.+)\?", question):
        dx, dy, _ = truth.offset(thing(match[1]))
        assert json.loads(answer) == pytest.approx([dx, dy, HOVER_M - truth.gripper_m[2]], abs=HALF_UNIT_M)
        return "above_m"
    if match := re.fullmatch(r"Offset in metres from the gripper to the (.+)\?", question):
        assert json.loads(answer) == pytest.approx(truth.offset(thing(match[1])), abs=HALF_UNIT_M)
        assert "-0.0," not in answer and "-0.0]" not in answer
        return "offset_m"
    if question == "Where is the gripper?":
        assert centimetres(answer) == pytest.approx(truth.gripper_m, abs=HALF_UNIT_M)
        return "gripper"
    if question == "How high is the gripper?":
        assert float(answer.removesuffix(" cm")) / 100 == pytest.approx(truth.gripper_m[2], abs=HALF_UNIT_M)
        return "height"
    if match := re.fullmatch(r"Where is the (.+)\?", question):
        assert centimetres(answer)[:2] == pytest.approx(truth.position(thing(match[1]))[:2], abs=HALF_UNIT_M)
        return "where"
    return None


def check_words(truth: Truth, question: str, answer: str) -> str | None:
    if match := re.fullmatch(r"Which way is the (point above the )?(.+) from the gripper\?", question):
        delta = list(truth.offset(thing(match[2])))
        delta[2] = HOVER_M - truth.gripper_m[2] if match[1] else delta[2]
        words = [] if answer == "none" else re.split(r", | and ", answer)
        said = {SIGNED[word.split()[-1]] for word in words}
        assert said == {(i, 1 if v > 0 else -1) for i, v in enumerate(delta) if abs(v) >= IGNORED_BELOW_M}
        return "way"
    if question == "Is the gripper open or closed?":
        assert answer == ("open" if truth.gripper_fraction > 0.8 else "closed")
        return "open"
    if question == "What is the gripper holding?":
        assert (None if answer == "nothing" else thing(answer.removeprefix("the "))) == truth.held
        return "held"
    if match := re.fullmatch(r"Is there a (.+) in the picture\?", question):
        assert (answer == "yes") == (thing(match[1]) in {*truth.objects, *truth.cards})
        return "there"
    if question == "How many objects are on the counter, cards not counted?":
        assert int(answer) == len(truth.objects)
        return "count"
    if question == "What is in the picture?":
        assert {thing(part.removeprefix("a ")) for part in answer.split(", ")} == {*truth.objects, *truth.cards}
        return "list"
    return None


def check_state(truth: Truth, question: str, answer: str) -> str | None:
    if match := re.fullmatch(r"Is the gripper right above the (.+)\?", question):
        dx, dy, _ = truth.offset(thing(match[1]))
        low, high = HOVER_RANGE_M
        assert answer == ("yes" if np.hypot(dx, dy) <= ALIGNED_M and low <= truth.gripper_m[2] <= high else "no")
        return "right above"
    if match := re.fullmatch(r"Is the (.+) in the gripper\?", question):
        assert answer == ("yes" if truth.held == thing(match[1]) else "no")
        return "in the gripper"
    if match := re.fullmatch(r"Is the (.+) lifted\?", question):
        name = thing(match[1])
        high_m = truth.position(name)[2] - KINDS[name].rest_z_m
        assert answer == ("yes" if truth.held == name and high_m >= LIFTED_M else "no")
        return "lifted"
    return None


def check_change(before: Truth, after: Truth, question: str, answer: str) -> str | None:
    if match := re.fullmatch(r"Did the gripper move (\w+)\?", question):
        axis, sign = SIGNED[match[1]]
        moved = sign * (after.gripper_m[axis] - before.gripper_m[axis])
        assert answer == ("yes" if moved > 0 else "no")
        return "moved"
    if question == "Did the gripper take something?":
        assert answer == ("yes" if before.held is None and after.held is not None else "no")
        return "took"
    if question == "Did the gripper let something go?":
        assert answer == ("yes" if before.held is not None and after.held is None else "no")
        return "let go"
    return None


def check_relations(truth: Truth, question: str, answer: str) -> str | None:
    if match := re.fullmatch(r"Is the (.+) (left of|further forward than) the (.+)\?", question):
        axis = 1 if match[2] == "left of" else 0
        one, two = (truth.position(thing(match[index]))[axis] for index in (1, 3))
        assert answer == ("yes" if one > two else "no")
        return match[2]
    if match := re.fullmatch(r"Which is nearer to the gripper, the (.+) or the (.+)\?", question):
        away = {thing(text): np.hypot(*truth.offset(thing(text))[:2]) for text in match.groups()}
        assert thing(answer.removeprefix("the ")) == min(away, key=lambda name: float(away[name]))
        return "nearer"
    if match := re.fullmatch(r"Which item is above the (\w+)\?", question):
        assert truth.above_card(match[1]) == thing(answer)
        return "above"
    if question == "Which pictures lie on the counter?":
        assert set(answer.split(", ")) == set(truth.cards)
        return "pictures"
    if match := re.fullmatch(r"What colour is the (.+)\?", question):
        assert answer == COLOURS[thing(match[1])]
        return "colour"
    if match := re.fullmatch(r"What is '(.+)' in English\?", question):
        assert answer == NAMES[thing(match[1])][0]
        return "translate"
    if match := re.fullmatch(r"Translate into English: '(.+)'", question):
        named = [name for name, names in NAMES.items() if any(foreign in match[1] for foreign in names[1:])]
        assert any(NAMES[name][0] in answer for name in named)
        return "instruction"
    return None


CHECKS = (check_numbers, check_words, check_state, check_relations)


def test_every_answer_is_true_and_every_kind_is_asked() -> None:
    rng = np.random.default_rng(5)
    asked: Counter[str] = Counter()
    for _ in range(900):
        truth = random_truth(rng)
        for question, answer in conversation(truth, rng, turns=8):
            found = [check(truth, question, answer) for check in CHECKS]
            kinds = [kind for kind in found if kind is not None]
            assert len(kinds) == 1, f"{len(kinds)} checks know the question {question!r}"
            asked[kinds[0]] += 1
    assert len(asked) == 23 and min(asked.values()) >= 3, asked


def test_half_of_the_questions_about_two_pictures_are_about_what_changed() -> None:
    rng = np.random.default_rng(6)
    asked: Counter[str] = Counter()
    for _ in range(100):
        before, after = random_truth(rng), random_truth(rng)
        for question, answer in conversation(after, rng, 6, before):
            found = check_change(before, after, question, answer)
            asked[found or "the later picture"] += 1
            assert found is not None or any(check(after, question, answer) for check in CHECKS), question
    assert 200 < asked["the later picture"] < 400 and min(asked.values()) >= 20 and len(asked) == 4, asked


def test_a_conversation_repeats_from_its_generator_and_has_its_length() -> None:
    truth = random_truth(np.random.default_rng(1))
    one, other = (conversation(truth, np.random.default_rng(9), turns=6) for _ in range(2))
    assert one == other and len(one) == 6
    assert conversation(truth, np.random.default_rng(10), turns=6) != one


def test_questions_use_all_four_languages() -> None:
    rng = np.random.default_rng(2)
    text = " ".join(q for _ in range(300) for q, _ in conversation(random_truth(rng), rng, turns=6))
    for column in range(4):
        assert all(names[column] in text for names in NAMES.values()), f"language {column}"


def test_texts_without_a_picture_hold_no_answer() -> None:
    rng = np.random.default_rng(3)
    texts = [user_text(rng) for _ in range(120)]
    assert len(set(texts)) > 60
    fixed = prompt_texts()
    for text in texts:
        assert any(text.startswith(part) for part in fixed), text
        assert not text.rstrip().endswith("]]")


def test_a_scene_is_a_function_of_its_seed() -> None:
    assert random_scene(11) == random_scene(11)
    assert len({repr(random_scene(seed)) for seed in range(40)}) == 40


def test_scenes_cover_what_they_should() -> None:
    scenes = [random_scene(seed) for seed in range(300)]
    assert {item.name for spec, _ in scenes for item in spec.objects} == set(KINDS)
    assert {card.name for spec, _ in scenes for card in spec.cards} == set(CARDS)
    holding = sum(held is not None for _, held in scenes)
    assert 20 < holding < 80
    assert all(held is None or spec.object(held).position_m == spec.start_position_m for spec, held in scenes)


def test_a_still_shows_what_it_says() -> None:
    made = [pair for seed in range(4) if (pair := pretrain_data.still(seed)) is not None]
    assert made
    for picture, truth in made:
        assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
        assert set(truth.pixels) == {"gripper", *truth.objects, *(f"card {name}" for name in truth.cards)}
        assert all(-0.5 < v < 1.5 for place in truth.pixels.values() for v in place)
