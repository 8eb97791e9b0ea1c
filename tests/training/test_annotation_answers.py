"""Answers of an annotator: copied rows laid over the log, ranges, and what makes an answer unusable."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import PICK, episode_of

from vlm2vla_schema.embodiments import WIDOWX_ROTATION
from vlm2vla_schema.gemini import GeminiAnswer
from vlm2vla_training.annotation.copies import MAX_WRONG, align, copy_findings
from vlm2vla_training.annotation.findings import copy_error_rate, said_directions
from vlm2vla_training.annotation.gemini_answer import read_annotation
from vlm2vla_training.annotation.gemini_budget import image_tokens, read_price
from vlm2vla_training.annotation.gemini_request import chosen_frames, log_text
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / "b1_open_the_silver_pot.json"


def silver_pot() -> tuple[list[dict[str, Any]], Episode]:
    """B.1's printed annotation, and the log that it copies."""
    steps = json.loads(GOLDEN.read_text())["steps"]
    rows = np.array([row for step in steps for row in step["actions"]])
    actions = np.insert(rows, [3, 3, 3], 0.0, axis=1)
    return steps, Episode("bridge/0", "open the silver pot", "bridge", [], actions, np.zeros_like(actions))


def test_the_printed_annotation_lies_where_its_rows_lie() -> None:
    steps, episode = silver_pot()
    alignment = align([step["actions"] for step in steps], episode.actions[:, [0, 1, 2, 6]])
    assert alignment.ranges == [(0, 9), (9, 10), (10, 17), (17, 22), (22, 23), (23, 29)]
    assert (alignment.wrong, alignment.unsure) == (0, [])


def test_the_printed_annotation_is_read_and_its_marks_are_no_words() -> None:
    steps, episode = silver_pot()
    answer = [
        {"step_description": step["step_description"], "reasoning": "Move back (-dx), then close (0).",
         "main_movements": "".join(f"{word} (-dz), " for word in step["directions"]) + f"gripper ({step['gripper']}).",
         "actions": step["actions"]}
        for step in steps
    ]  # fmt: skip
    reading = read_annotation(episode, GeminiAnswer("text", json.dumps(answer)), "b1-paper")
    assert [step.actions for step in reading.steps] == [step["actions"] for step in steps]
    assert reading.steps[0].main_movements == "backward, right, downward, gripper."
    assert reading.steps[0].reasoning == "Move back, then close."
    assert not reading.problems


cuts = st.lists(st.integers(1, 29), max_size=5, unique=True).map(sorted)


@given(cuts, st.integers(0, 2**31))
def test_an_exact_copy_is_found_wherever_it_is_cut(places: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).integers(-2, 3, (30, 4)) / 1000  # few values: many equal rows
    bounds = [0, *places, 30]
    copies = [rows[begin:end].tolist() for begin, end in pairwise(bounds)]
    alignment = align(copies, rows)
    assert alignment.ranges == list(pairwise(bounds)) and not alignment.wrong


def distinct_rows(count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[0.001 * index, -0.001 * index, 0.002, 1.0] for index in range(count)])


def test_a_wrong_row_inside_a_step_moves_no_boundary() -> None:
    rows = distinct_rows(30)
    copies = [rows[:10].tolist(), rows[10:].tolist()]
    copies[0][4][0] += 0.005
    del copies[1][7]
    alignment = align(copies, rows)
    assert alignment.ranges == [(0, 10), (10, 30)] and alignment.wrong == 2 and not alignment.unsure
    (finding,) = copy_findings(alignment, ["a", "b"], 30)
    assert not finding.grave and "2 copied rows" in finding.detail


def test_a_boundary_that_the_copy_leaves_open_is_grave() -> None:
    rows = distinct_rows(30)
    alignment = align([rows[:10].tolist(), rows[12:].tolist()], rows)  # of which step are rows 10 and 11?
    assert alignment.unsure == [1]
    assert [finding.grave for finding in copy_findings(alignment, ["a", "b"], 30)] == [True, False]


def test_a_copy_of_another_log_is_grave() -> None:
    rows = distinct_rows(30)
    alignment = align([(rows + 0.5).tolist()], rows)
    assert alignment.wrong == 30 > MAX_WRONG * 30 and alignment.ranges == [(0, 30)]
    assert [finding.grave for finding in copy_findings(alignment, ["a"], 30)] == [True]


def ranged(*ranges: tuple[int, int]) -> str:
    words = {"step_description": "Move to Carrot", "reasoning": "r", "main_movements": "Up."}
    return json.dumps([{**words, "first": first, "last": last} for first, last in ranges])


@pytest.mark.parametrize(
    ("answer", "check", "words"),
    [
        (GeminiAnswer("text", ranged((0, 8), (9, 30))), "partition", "end before row"),
        (GeminiAnswer("text", ranged((0, 8), (8, 20))), "partition", "begins at 9"),
        (GeminiAnswer("text", ranged((0, 8), (10, 20))), "partition", "begins at 9"),
        (GeminiAnswer("text", ranged((-5, 20))), "partition", "begins at 0"),
        (GeminiAnswer("text", ranged((5, 2))), "partition", "begins at 0"),
        (GeminiAnswer("text", "[]"), "answer", "empty list"),
        (GeminiAnswer("text", ""), "answer", "not the JSON"),
        (GeminiAnswer("text", "```json\n" + ranged((0, 20)) + "\n```"), "answer", "not the JSON"),
        (GeminiAnswer("text", ranged((0, 20)).replace("20", "20.5")), "answer", "last"),
        (GeminiAnswer("text", ranged((0, 20)).replace("20", "true")), "answer", "last"),
        (GeminiAnswer("text", ranged((0, 20)).replace('"reasoning"', '"why"')), "answer", "reasoning"),
        (GeminiAnswer("cut", ranged((0, 20)), "MAX_TOKENS", "was cut"), "answer", "was cut"),
    ],
)
def test_answers_that_cannot_be_used(answer: GeminiAnswer, check: str, words: str) -> None:
    episode = episode_of(PICK, "pick up the carrot")
    reading = read_annotation(episode, answer, "b1-ranges")
    grave = reading.grave(episode)
    assert check in {finding.check for finding in grave} and any(words in finding.detail for finding in grave)
    assert reading.again


def test_only_a_refused_prompt_is_not_asked_again() -> None:
    episode = episode_of(PICK, "pick up the carrot")
    refused = read_annotation(episode, GeminiAnswer("blocked", message="refused"), "b1-ranges")
    stopped = read_annotation(episode, GeminiAnswer("blocked", "", "SAFETY", "stopped"), "b1-ranges")
    assert (refused.again, stopped.again) == (False, True) and refused.grave(episode) and stopped.grave(episode)


def test_the_log_as_text() -> None:
    _, episode = silver_pot()
    lines = log_text(episode).splitlines()
    assert lines[0] == "Instruction: open the silver pot" and len(lines) == 2 + 29
    assert lines[3] == "1: [-0.002, -0.002, -0.013, 1.0]" and lines[-1] == "28: [0.0, 0.0, 0.001, 1.0]"


def test_rows_with_rotation_are_shown_and_their_copies_found() -> None:
    _, episode = silver_pot()
    episode.actions[:, 5] = np.arange(29) / 100
    assert log_text(episode, WIDOWX_ROTATION).splitlines()[3] == "1: [-0.002, -0.002, -0.013, 0.0, 0.0, 0.01, 1.0]"
    words = {"step_description": "Move to Lid", "reasoning": "r", "main_movements": "Turning counterclockwise."}
    answer = [{**words, "actions": episode.actions[:12].tolist()}, {**words, "actions": episode.actions[12:].tolist()}]
    reading = read_annotation(episode, GeminiAnswer("text", json.dumps(answer)), "b1-paper", WIDOWX_ROTATION)
    assert [(step.first, step.last) for step in reading.steps] == [(0, 11), (12, 28)] and not reading.problems
    assert reading.steps[0].actions == episode.actions[:12][:, [0, 1, 2, 6]].tolist()
    assert reading.copies is not None and copy_error_rate(reading.copies, episode.actions) == 0.0
    assert all(said_directions(word) == set() for axis in WIDOWX_ROTATION.axes[3:] for word in axis.words)


def test_frames_are_thinned_until_they_fit_into_a_request() -> None:
    episode = episode_of(PICK, "pick up the carrot")
    size = max(len(image) for image in episode.images)
    assert [number for number, _ in chosen_frames(episode, 10)] == [0, 10, 20]
    assert len(chosen_frames(episode, 1)) == 21
    few = chosen_frames(episode, 1, max_bytes=8 * size)
    assert [number for number, _ in few] == [0, 3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize(
    ("size", "tokens"), [((256, 256), 258), ((384, 384), 258), ((640, 480), 4 * 258), ((960, 540), 6 * 258)]
)
def test_pictures_are_counted_as_google_says(size: tuple[int, int], tokens: int) -> None:
    assert image_tokens(*size) == tokens


@pytest.mark.parametrize("text", ["", "[m]\ninput_usd = 1.0", "[m]\ninput_usd = -1\noutput_usd = 1", "m = 3", "[["])
def test_price_tables_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(UsageError, match="price"):
        read_price(tmp_path / "prices.toml", "m")
