"""The prompts are those of appendices D.4 and D.5, byte for byte, whatever text is put into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_schema import prompts
from vlm2vla_schema.embodiments import WIDOWX_ROTATION

GOLDEN = Path(__file__).parent.parent / "golden"
TEXTS = [
    "pick up the carrot",
    "put '{subtask}' in the {pot}",
    "{motion_plan}{next_subtask}{0}{}%s\\1\\g<0>",
    "ramasse la carotte, s'il te plaît",
    '"quoted"\nsecond line',
]


def golden(name: str, **values: str) -> str:
    """Put values in by splitting, so that a value is never searched for places."""
    parts = [(GOLDEN / name).read_bytes().decode()]
    for place, value in values.items():
        marker = "{" + place + "}"
        split: list[str] = []
        for index, part in enumerate(parts):
            if index % 2 == 0:
                before, found, after = part.partition(marker)
                split += [before, value, after] if found else [part]
            else:
                split.append(part)
        parts = split
    return "".join(parts)


@pytest.mark.parametrize("first", TEXTS)
@pytest.mark.parametrize("second", TEXTS)
def test_prompts_equal_the_golden_files(first: str, second: str) -> None:
    assert prompts.subtasks_prompt(first) == golden("d4_subtasks.txt", task=first)
    assert prompts.motion_plan_prompt(first) == golden("d4_motion_plan.txt", subtask=first)
    assert prompts.actions_prompt(first, second) == golden("d4_actions.txt", subtask=first, motion_plan=second)
    assert prompts.verify_prompt(first, second) == golden("d5_verify.txt", subtask=first, next_subtask=second)
    assert prompts.annotation_prompt(first) == golden("b1_annotation.txt", trajectory_log=first)


def test_the_ranges_prompt_differs_from_the_printed_one_in_labels_and_form_only() -> None:
    ranges = prompts.annotation_prompt("the log", "b1-ranges").split("\n\n")
    printed = prompts.annotation_prompt("the log").split("\n\n")
    assert ranges[0] == printed[0].replace("a task, and", "a task, each after its observation number, and")
    assert ranges[1] == printed[1] and "Do not copy the actions" in ranges[2] and ranges[3:] == printed[3:]


def test_without_a_motion_plan_only_its_clause_is_missing() -> None:
    full = prompts.actions_prompt("Grasp Pot", "go down")
    assert prompts.actions_prompt("Grasp Pot", None) == full.replace(" and the reasoning 'go down'", "")


def test_the_last_subtask_has_its_own_version() -> None:
    last = prompts.verify_prompt("Release", None)
    assert "(Release)" in last
    assert "Next Subtask" not in last
    assert last.partition("\n")[2] == prompts.verify_prompt("Release", "x").partition("\n")[2]
    assert prompts.verify_prompt_version(None) == "d5-last"
    assert prompts.verify_prompt_version("Release") == "d5"


def test_versions_of_the_printed_prompts() -> None:
    versions = prompts.PROMPT_VERSIONS
    assert [versions[stage] for stage in ("subtasks", "motion_plan", "actions", "verify")] == ["d4", "d4", "d4", "d5"]


def test_a_card_with_rotation_changes_the_axes_and_nothing_else() -> None:
    for version, row in (("b1-paper", "representing [dx, dy, dz, droll, dpitch, dyaw, gripper]"), ("b1-ranges", "")):
        four = prompts.annotation_prompt("the log", version)
        seven = prompts.annotation_prompt("the log", version, WIDOWX_ROTATION)
        assert "a 7-DoF robot arm (x,y,z,roll,pitch,yaw,gripper)" in seven and row in seven
        assert all(axis.signs in seven for axis in WIDOWX_ROTATION.axes)
        back = seven.replace("7-DoF", "4-DoF").replace(",roll,pitch,yaw", "").replace(", droll, dpitch, dyaw", "")
        for axis in WIDOWX_ROTATION.axes[3:]:
            back = back.replace(" " + axis.signs, "")
        words = WIDOWX_ROTATION.places()["words"]
        assert back.replace(words, "forward, backward, left, right, up and down") == four


@given(st.text(), st.text())
def test_inserted_text_is_unescaped_and_complete(first: str, second: str) -> None:
    prompt = prompts.actions_prompt(first, second)
    assert prompt.count(f"the sub-task '{first}' and the reasoning '{second}', output") >= 1
    assert len(prompt) == len(prompts.actions_prompt("", "")) + len(first) + len(second)
    assert first in prompts.completion_prompt(first)
    assert first in prompts.direction_prompt(first)
    assert prompts.annotation_prompt(first).endswith(first)
    assert f"({second})" in prompts.human_prompt(first, second)


def test_the_printed_human_prompt() -> None:
    expected = (
        "You are programming a 4-DoF robot arm. Based on the image (obs_0.jpg) and subtask 'Grasp the Yellow Pepper', "
        "output the sequence of low-level [x, y, z, gripper] actions needed to accomplish the task."
    )
    assert prompts.human_prompt("Grasp the Yellow Pepper", "obs_0.jpg") == expected
