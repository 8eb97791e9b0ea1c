"""bench/edit_recovery.py: its operator speaks once and to the point, and an interrupted run is gone on with."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.scenes import choose_scene
from vlm2vla_twin.expert import Expert
from vlm2vla_twin.physics import World

BENCH = Path(__file__).resolve().parents[2] / "bench"
ROWS = [[0.0, 0.0, 0.01, 1.0]]


@pytest.fixture
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("edit_recovery")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def expert() -> Expert:
    return Expert(World(choose_scene("pick up the carrot", None, 500_001).spec))


def test_the_third_try_gets_the_experts_words_once(bench: Any, expert: Expert) -> None:
    editor = bench.Editor(expert)
    proposal = Proposal("Grasp Carrot", "Close the gripper.", ROWS)
    words = expert.motion_plan("Grasp Carrot")
    assert [editor(proposal) for _ in range(4)] == [True, True, Edit("Grasp Carrot", words), True]
    assert editor.edit["from"] == {"subtask": "Grasp Carrot", "motion_plan": "Close the gripper."}


def test_words_that_are_the_policys_own_are_no_edit(bench: Any, expert: Expert) -> None:
    editor = bench.Editor(expert)
    proposal = Proposal("Grasp Carrot", expert.motion_plan("Grasp Carrot"), ROWS)
    assert all(editor(proposal) is True for _ in range(4)) and editor.edit is None


def test_a_lift_of_nothing_goes_back_to_the_grasp(bench: Any, expert: Expert) -> None:
    editor = bench.Editor(expert)
    assert editor(Proposal("Grasp the carrot", "Close the gripper.", ROWS)) is True
    answers = [editor(Proposal("Lift Carrot", "Move up.", ROWS)) for _ in range(3)]
    assert answers == [True, True, Edit("Grasp the carrot", expert.motion_plan("Grasp the carrot"))]


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
