"""bench/edit_recovery.py: its operator speaks once and to the point, and an interrupted run is gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_programs import program

from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.scenes import choose_scene
from vlm2vla_twin.expert import Expert
from vlm2vla_twin.physics import World

ROWS = [[0.0, 0.0, 0.01, 1.0]]


@pytest.fixture
def bench() -> Iterator[Any]:
    with program("edit_recovery") as module:
        yield module


def scene() -> Expert:
    return Expert(World(choose_scene("pick up the carrot", None, 500_001).spec))


def closed_over_the_carrot(expert: Expert) -> None:
    """The gripper closed in the air, as after a grasp that was missed."""
    expert.world.command_gripper(False)
    expert.world.step(1.5)
    assert expert.world.gripper_fraction() < 0.1


def test_an_approach_gets_the_experts_words_at_its_fourth_try_once(bench: Any) -> None:
    editor = bench.Editor(scene())
    proposal = Proposal("Move to Carrot", "Move up, gripper stays open.", ROWS)
    words = editor.expert.motion_plan("Move to Carrot")
    assert [editor(proposal) for _ in range(5)] == [True, True, True, Edit("Move to Carrot", words), True]
    assert editor.edit["from"] == {"subtask": "Move to Carrot", "motion_plan": "Move up, gripper stays open."}


def test_words_that_are_the_policys_own_are_no_edit(bench: Any) -> None:
    editor = bench.Editor(scene())
    proposal = Proposal("Move to Carrot", editor.expert.motion_plan("Move to Carrot"), ROWS)
    assert all(editor(proposal) is True for _ in range(5)) and editor.edit is None


def test_a_lift_of_nothing_goes_back_to_the_approach(bench: Any) -> None:
    editor = bench.Editor(scene())
    assert editor(Proposal("Move near the carrot", "Move down.", ROWS)) is True
    closed_over_the_carrot(editor.expert)
    answer = editor(Proposal("Lift Carrot", "Move up.", ROWS))
    assert answer == Edit("Move near the carrot", editor.expert.motion_plan("Move near the carrot"))
    assert answer.motion_plan.startswith("Open the gripper")


def test_a_grasp_that_would_close_a_closed_gripper_goes_back_and_one_that_opens_it_does_not(bench: Any) -> None:
    editor = bench.Editor(scene())
    editor(Proposal("Move to Carrot", "Move down.", ROWS))
    assert editor(Proposal("Grasp Carrot", "Move down, then close the gripper.", ROWS)) is True
    closed_over_the_carrot(editor.expert)
    assert editor(Proposal("Grasp Carrot", "Open the gripper, then move down, then close the gripper.", ROWS)) is True
    answer = editor(Proposal("Grasp Carrot", "Close the gripper.", ROWS))
    assert answer == Edit("Move to Carrot", editor.expert.motion_plan("Move to Carrot"))


def test_trials_that_are_known_are_not_run_again(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, bool]] = []

    def trial(request: Any, edited: bool) -> dict[str, Any]:
        ran.append((request.choice.seed, edited))
        return {"success": edited}

    monkeypatch.setattr(bench, "trial", trial)
    path, request = tmp_path / "new" / "log.jsonl", SimpleNamespace(choice=SimpleNamespace(seed=7))
    assert not bench.Log(path, {"suite": "a"}).trial("alone", request)["success"]
    with path.open("a") as file:
        file.write('{"seed": 7, "kind": "edi')  # a line that a crash cut
    log = bench.Log(path, {"suite": "a"})
    assert not log.trial("alone", request)["success"] and log.trial("edited", request)["success"]
    assert ran == [(7, False), (7, True)]
    assert [json.loads(line).get("kind") for line in path.read_text().splitlines()] == [None, "alone", "edited"]
    with pytest.raises(SystemExit, match="another --out"):
        bench.Log(path, {"suite": "b"})
