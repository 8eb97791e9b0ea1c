"""An operator's words, from the question before a chunk to the curated examples, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import read_episode
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import SimRequest, run_in_twin
from vlm2vla_schema.parsing import parse_actions
from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.cli import main
from vlm2vla_training.curation.decisions import content_hash
from vlm2vla_training.jsonio import read_jsonl

TASK = "pick up the carrot"
SEED = 500_021
PLAN = "Go straight down around the “carrot”, then close the gripper gently."
SUBTASK = "Move over to the Carrot"


def edited(proposal: Proposal, done: list[str]) -> bool | Edit:
    """Two edits: another name for the first subtask, other words for how to grasp."""
    verb = proposal.subtask.split()[0]
    if verb in done:
        return True
    done.append(verb)
    if verb == "Move":
        return Edit(SUBTASK)
    return Edit(proposal.subtask, PLAN) if verb == "Grasp" else True


def record(folder: Path, verifier: str) -> Path:
    done: list[str] = []
    request = SimRequest(
        task=TASK,
        choice=choose_scene(TASK, None, SEED),
        policy="expert",
        verifiers=(verifier,),
        animate=False,
        confirm=lambda proposal: edited(proposal, done),
    )
    result = run_in_twin(request, folder, SilentProgress())
    assert result.exit_code == 0, result.message
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    record(root / "verified", "twin")
    record(root / "unchecked", "none")
    return root


@pytest.fixture(scope="module")
def work(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings through ingest, annotate and curate by the commands that docs/train.md names."""
    out = tmp_path_factory.mktemp("work")
    commands = (
        ["ingest", "--input", str(recordings), "--out", str(out / "episodes")],
        ["annotate", "--episodes", str(out / "episodes"), "--out", str(out / "rules")],
        ["annotate", "--episodes", str(out / "episodes"), "--annotator", "corrections", "--annotated",
         str(out / "rules"), "--out", str(out / "annotated")],
        ["curate", "--episodes", str(out / "episodes"), "--annotated", str(out / "annotated"),
         "--out", str(out / "examples")],
    )  # fmt: skip
    for command in commands:
        assert main(command) == 0, command
    return out


def annotated_by(work: Path, name: str) -> dict[str, AnnotatedEpisode]:
    found = map(AnnotatedEpisode.from_json, read_jsonl(work / name / "annotated.jsonl"))
    return {episode.episode_key: episode for episode in found}


def examples(work: Path, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(work / "examples" / "part-00000.parquet").to_pylist()
    return [row for row in rows if row["episode_key"] == key]


def test_verified_words_are_steps_with_the_rows_that_followed_them(work: Path, recordings: Path) -> None:
    episode = annotated_by(work, "annotated")["recordings/verified"]
    human = {step.step_description: step for step in episode.steps if step.author == "human"}
    assert set(human) == {SUBTASK, "Grasp Carrot"} and episode.annotator == "rules-3+corrections-1"
    assert human["Grasp Carrot"].main_movements == PLAN
    recording = read_episode(recordings / "verified")
    for correction in (event for event in recording.events if event["event"] == "correction"):
        cycle = correction["cycle"] + 1
        step = human[correction["subtask"]["to"]]
        moved = [e["action"] for e in recording.events if e["event"] == "step" and e["cycle"] == cycle]
        assert step.actions == [[*action[:3], action[6]] for action in moved] and moved
    assert episode.audit["covered"] and episode.audit["quarantine"] is None


def test_edited_words_stand_in_the_examples_byte_for_byte(work: Path) -> None:
    found = examples(work, "recordings/verified")
    plans = [row for row in found if row["kind"] == "motion_plan" and row["completion"] == PLAN]
    assert len(plans) == 1 and "Grasp Carrot" in plans[0]["prompt"]
    (actions,) = [row for row in found if row["kind"] == "actions" and PLAN in row["prompt"]]
    assert parse_actions(actions["completion"]).rows
    named = {row["kind"] for row in found if SUBTASK in row["prompt"]}
    assert {"motion_plan", "actions", "verify", "completion"} <= named
    lists = [row["completion"] for row in found if row["kind"] == "subtasks"]
    assert any(f"'{SUBTASK}', 'Grasp Carrot'" in text or f'"{SUBTASK}", "Grasp Carrot"' in text for text in lists)


def test_an_edit_that_nobody_verified_is_counted_and_no_example(work: Path) -> None:
    summary = json.loads((work / "annotated" / "summary.json").read_text())["corrections"]
    reason = "no verifier looked (verifier none)"
    assert (summary["met"], summary["used"], summary["not_used"]) == (4, 2, {reason: 2})
    assert {one["episode_key"] for one in summary["named"]} == {"recordings/unchecked"}
    under, laid = (annotated_by(work, name)["recordings/unchecked"] for name in ("rules", "annotated"))
    assert laid.steps == under.steps
    written = json.dumps([row["prompt"] + row["completion"] for row in examples(work, "recordings/unchecked")])
    assert written != "[]" and json.dumps(PLAN)[1:-1] not in written and SUBTASK not in written


def test_what_nobody_corrected_keeps_the_name_that_decisions_know(work: Path) -> None:
    under, laid = (annotated_by(work, name)["recordings/unchecked"] for name in ("rules", "annotated"))
    renamed = AnnotatedEpisode(laid.episode_key, laid.instruction, under.annotator, laid.steps, laid.audit)
    assert content_hash(renamed) == content_hash(under)
