from __future__ import annotations

import pytest

from vlm2vla_twin.scene import CARDS, KINDS
from vlm2vla_twin.skills import Goal, Skill, mentioned, parse_subtask, parse_task, skills_for, title


@pytest.mark.parametrize(
    ("text", "skill"),
    [
        ("Move to Carrot", Skill("move", "carrot")),
        ("Grasp Carrot", Skill("grasp", "carrot")),
        ("close the gripper around the carrot", Skill("grasp", "carrot")),
        ("Lift the Carrot", Skill("lift", "carrot")),
        ("Pick up the purple thing", Skill("lift", "eggplant")),
        ("Move Carrot to Yellow Plate", Skill("carry", "carrot", "plate")),
        ("bring the carrot above the plate", Skill("carry", "carrot", "plate")),
        ("Lower Eggplant to Pan", Skill("lower", "eggplant", "pan")),
        ("Place the fish on the plate", Skill("lower", "fish", "plate")),
        ("Release Carrot", Skill("release", "carrot")),
        ("Open the gripper to let go of the banana", Skill("release", "banana")),
        ("MOVE TO ZANAHORIA", Skill("move", "carrot")),
        ("Move to 胡萝卜", Skill("move", "carrot")),
        ("Move to गाजर", Skill("move", "carrot")),
        ("Move to Pan", Skill("move", "pan")),
    ],
)
def test_a_subtask_is_read(text: str, skill: Skill) -> None:
    assert parse_subtask(text) == skill


@pytest.mark.parametrize("text", ["", "Retract", "Move to the spoon", "Admire the carrot", "[[0.1, 0.0, 0.0, 1.0]]"])
def test_what_names_no_known_thing_or_verb_is_no_skill(text: str) -> None:
    assert parse_subtask(text) is None


def test_a_word_inside_another_one_is_not_mentioned() -> None:
    assert mentioned("an expanse of frying-pans") == ["pan"]
    assert mentioned("japan and marzipan") == []
    assert mentioned("the fish, then the carrot by the fish") == ["fish", "carrot"]


@pytest.mark.parametrize(
    ("text", "goals"),
    [
        ("pick up the carrot", [Goal("carrot")]),
        ("put the carrot on the yellow plate", [Goal("carrot", "plate")]),
        ("put the eggplant in the pan, then lift the fish", [Goal("eggplant", "pan"), Goal("fish")]),
        ("recoge la zanahoria", [Goal("carrot")]),
        ("拿起胡萝卜", [Goal("carrot")]),
        ("गाजर उठाओ", [Goal("carrot")]),
        ("Pick up the item above the ROCKET", "rocket"),
        ("pick up the teapot", None),
        ("clean the yellow plate", None),
    ],
)
def test_a_task_is_read(text: str, goals: list[Goal] | str | None) -> None:
    assert parse_task(text) == goals


@pytest.mark.parametrize("card", CARDS)
def test_every_card_is_known_by_name(card: str) -> None:
    assert parse_task(f"pick up the item above the {card}") == card


def test_placing_takes_six_skills_and_lifting_three() -> None:
    kinds = [skill.kind for skill in skills_for([Goal("carrot", "plate"), Goal("fish")])]
    assert kinds == ["move", "grasp", "lift", "carry", "lower", "release", "move", "grasp", "lift"]


def test_a_title_is_read_back_as_its_own_skill() -> None:
    graspable = [name for name, kind in KINDS.items() if kind.graspable]
    for name in graspable:
        for place in ("plate", "pan"):
            for skill in skills_for([Goal(name, place)]):
                read = parse_subtask(title(skill))
                assert read is not None
                assert (read.kind, read.object) == (skill.kind, skill.object)
                if skill.kind in ("carry", "lower"):
                    assert read.target == place
