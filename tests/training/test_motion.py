import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_training.curation.motion import degree_words, directions, motion_sentence, summed

GOLDEN = Path(__file__).parents[1] / "golden"
B1 = json.loads((GOLDEN / "b1_open_the_silver_pot.json").read_text())
PRINTED = {"up": "upward", "down": "downward"}


@pytest.mark.parametrize("step", B1["steps"], ids=lambda step: step["step_description"])
def test_directions_agree_with_the_printed_annotation(step: dict[str, object]) -> None:
    actions = step["actions"]
    printed = step["directions"]
    assert isinstance(actions, list) and isinstance(printed, list)
    found = [PRINTED.get(word, word) for word in directions(summed(actions))]
    assert set(found) <= set(printed)


def test_words_of_degree() -> None:
    assert degree_words((0.12, 0.03, -0.07)) == "far forward, slightly left and down"
    assert degree_words((0.0, -0.01, 0.0)) == "very slightly right"
    assert degree_words((0.0099, -0.0099, 0.0)) == ""
    assert degree_words((0.025, 0.0, 0.05)) == "slightly forward and up"
    assert degree_words((-0.10, 0.0, 0.0)) == "far backward"


def test_sentences() -> None:
    descend = [[0.0, 0.0, -0.03, 1.0]] * 2
    assert motion_sentence([[0.04, 0.015, -0.01, 1.0]] * 3, 1.0) == (
        "Move far forward, slightly left and slightly down, gripper stays open."
    )
    assert motion_sentence([*descend, [0.0, 0.0, 0.0, 0.0]], 1.0) == "Move down, then close the gripper."
    assert motion_sentence([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.06, 1.0]], 0.0) == "Open the gripper, then move up."
    assert motion_sentence([[0.0, 0.0, 0.0, 1.0]], 1.0) == "Hold still, gripper stays open."
    assert motion_sentence([[0.0, 0.0, 0.08, 0.0]], 0.0) == "Move up, gripper stays closed."
    retry = [[0.0, 0.0, 0.05, 1.0], [0.0, 0.0, -0.05, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert motion_sentence(retry, 0.0) == "Open the gripper, then move up, then move down, then close the gripper."


@given(st.lists(st.tuples(*[st.floats(-0.05, 0.05)] * 3, st.sampled_from([0.0, 1.0])).map(list), max_size=12))
def test_a_plan_has_no_digits_and_is_never_empty(actions: list[list[float]]) -> None:
    sentence = motion_sentence(actions)
    assert sentence.endswith(".") and not any(letter.isdigit() for letter in sentence)
