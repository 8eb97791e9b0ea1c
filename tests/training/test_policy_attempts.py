"""Demonstrations in which a policy acts first: the server's side is a small real HTTP server with canned cycles."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from json_server import serving
from training_fakes import PICK, Segment, episode_of, flat_image

from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.attempts import Attempts
from vlm2vla_training.cli import main
from vlm2vla_training.curation.examples import ExampleOptions, examples_of
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import DataError

Row = list[float]


def cycle(rows: list[Row]) -> dict[str, object]:
    stage = {
        "model": "twin",
        "policy": True,
        "prompt_version": "d4",
        "raw_text": "",
        "attempts": 1,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0},
        "timing_ms": {"queue": 0, "preprocess": 0, "first_token": 0, "generate": 0, "total": 0},
        "request_id": "r",
        "episode_id": None,
        "frame_id": None,
    }
    return {**stage, "motion_plan": "Move.", "actions": rows, "stages": {"motion_plan": stage, "actions": stage}}


@contextmanager
def cycles(answers: dict[str, tuple[int, object]]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A server whose /cycle answers by the first word of the subtask; gives its address and what it was asked."""
    asked: list[dict[str, object]] = []

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, object]:
        assert body is not None
        asked.append({"path": path, **body})
        return answers[str(body["subtask"]).split()[0]]

    with serving(answer) as url:
        yield url, asked


def demos(out: Path, url: str, episodes: int) -> list[AnnotatedEpisode]:
    arguments = ["demos", "--suite", "pick_carrot", "--episodes", str(episodes), "--seed", "40", "--out", str(out)]
    assert main([*arguments, "--policy", url]) == 0
    return [RulesAnnotator().annotate(episode) for episode in EpisodeDataset(out).episodes()]


def test_a_policy_that_stays_where_it_is_is_corrected_and_not_imitated(tmp_path: Path) -> None:
    """It neither moves nor opens again: each miss must stand in the log as a miss, and the demonstration still ends
    with the carrot held."""
    closed = cycle([[0.0, 0.0, 0.0, 0.0]])
    with cycles({"Move": (200, cycle([[0.0, 0.02, 0.0, 1.0]])), "Grasp": (200, closed)}) as (url, asked):
        annotated = demos(tmp_path, url, 8)
    assert {str(request["path"]) for request in asked} == {"/cycle"} and len({str(r["seed"]) for r in asked}) > 8
    failed = 0
    for episode in annotated:
        titles = [step.step_description for step in episode.steps]
        assert titles[-1] == "Lift Carrot" and titles.count("Grasp Carrot") >= 2
        failed += titles.count("Move to Carrot") - 1 + sum(step.missed for step in episode.steps)
        for example in examples_of(episode, ExampleOptions(kinds=("actions",), extra_starts=0)).examples:
            step = next(step for step in episode.steps if step.first == example.first)
            repeated = episode.steps[episode.steps.index(step) + 1 :][:1]
            assert not step.missed and not any(s.step_description == step.step_description for s in repeated)
    assert failed >= 6, "most carrots are not where the gripper was"


def test_what_cannot_be_parsed_is_no_motion_and_other_errors_end_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cycles({"Move": (502, {}), "Grasp": (500, {}), "Lift": (200, {"actions": []})}) as (url, _):
        attempts = Attempts(url, 0)
        assert attempts.rows(flat_image(), "Move to Carrot") == []
        with pytest.raises(DataError, match="500"):
            attempts.rows(flat_image(), "Grasp Carrot")
        with pytest.raises(DataError, match="/cycle"):
            attempts.rows(flat_image(), "Lift Carrot")
        attempts.close()
        arguments = ["demos", "--suite", "pick_carrot", "--episodes", "1", "--out", str(tmp_path), "--policy", url]
        assert main(arguments) != 0
    assert "answered 500" in capsys.readouterr().err
    attempts = Attempts(url, 0)
    with pytest.raises(DataError, match="did not answer"):
        attempts.rows(flat_image(), "Move to Carrot")
    attempts.close()


def test_a_rest_of_two_rows_splits_a_move_that_stopped_short() -> None:
    short: list[Segment] = [(0.06, 0.02, -0.03, 1, 4), (0.0, 0.0, 0.0, 1, 2), (0.06, 0.02, 0.0, 1, 4), *PICK[1:]]
    brief: list[Segment] = [short[0], (0.0, 0.0, 0.0, 1, 1), *short[2:]]
    settles: list[Segment] = [*short[:2], (0.015, 0.005, 0.0, 1, 2), *short[3:]]
    for segments, moves in ((short, 2), (brief, 1), (settles, 1)):
        steps = RulesAnnotator().annotate(episode_of(segments, "pick up the carrot")).steps
        assert [step.step_description for step in steps].count("Move to Carrot") == moves


def test_a_move_is_missed_when_the_grasp_that_held_was_elsewhere() -> None:
    there = PICK[:3]
    again: list[Segment] = [(0.0, 0.0, 0.06, 1, 4), (0.0, 0.04, 0.0, 1, 3), (0.0, 0.0, -0.06, 1, 4), *PICK[2:]]
    nearby: list[Segment] = [(0.0, 0.0, 0.06, 1, 4), (0.0, 0.005, 0.0, 1, 3), (0.0, 0.0, -0.06, 1, 4), *PICK[2:]]
    for after, missed in ((again, True), (nearby, False)):
        episode = RulesAnnotator().annotate(episode_of([*there, *after], "pick up the carrot"))
        assert [step.missed for step in episode.steps] == [missed, False, False, False]
        assert AnnotatedEpisode.from_json(json.loads(json.dumps(episode.to_json()))) == episode
        result = examples_of(episode, ExampleOptions(kinds=("actions", "verify"), verify_pairs=1))
        move = [e for e in result.examples if "Move to Carrot" in e.prompt]
        assert any(e.kind == "actions" for e in move) is not missed
        assert any('"success": true' in e.completion for e in move if e.kind == "verify") is not missed
