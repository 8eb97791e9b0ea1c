"""bench/task_words.py: what the base of that experiment is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bench_programs import program

from vlm2vla_training import pretrain_data
from vlm2vla_training.pretrain_data import NAMES
from vlm2vla_twin.truth import Truth

SCENE = Truth(
    gripper_m=(0.30, 0.0, 0.15), gripper_fraction=1.0, held=None, pixels={},
    objects={"carrot": (0.35, 0.05, 0.012), "banana": (0.25, -0.1, 0.012)}, cards={"rocket": (0.29, 0.05, 0.0)},
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(pretrain_data, "QUESTIONS", pretrain_data.QUESTIONS)
    with program("task_words") as module:
        yield module


def test_the_answer_is_the_thing_that_stands_first_in_the_task(bench: Any) -> None:
    rng = np.random.default_rng(0)
    languages, cards = set(), 0
    for question, answer in (pair for _ in range(2000) if (pair := bench.q_task(SCENE, rng)) is not None):
        task = question.split("'")[1]
        thing = next((name for name in NAMES if answer.lower().removeprefix("the ") == NAMES[name][0]), None)
        if "item above the rocket" in task:
            cards += 1
            assert thing == "carrot" or answer == "[0.05, 0.05, -0.08]"
            continue
        first = min(
            (place, name) for name, words in NAMES.items() for word in words if (place := task.lower().find(word)) >= 0
        )[1]
        languages.add(bench.language_of(question))
        if thing is None:
            dx, dy, _ = SCENE.offset(first)
            assert answer == f"[{round(dx, 3)}, {round(dy, 3)}, -0.08]"
        else:
            assert thing == first, (question, answer)
    assert languages == {"English", "Spanish", "Mandarin", "Hindi"} and cards > 200


def test_only_the_questions_are_more(bench: Any) -> None:
    before = {make.__name__: weight for make, weight in pretrain_data.QUESTIONS}
    bench.ask_for_tasks()
    after = {make.__name__: weight for make, weight in pretrain_data.QUESTIONS}
    assert after == {**before, "q_translate": 1.0, "q_card": 9.0, "q_task": 5.0}


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [("the carrot", "the carrot", True), ("Carrot", "carrot", False), ("[0.05, 0.05]", "[0.05, 0.05, 0.1]", False),
     ("[0.05, 0.05, 0.1]", "[0.06, 0.04, -0.08]", True), ("[0.05, 0.05, 0.1]", "[0.08, 0.05, 0.1]", False),
     ("[0.05", "[0.05, 0.05, 0.1]", False), ("[0.05]", "[0.05, 0.05, 0.1]", False)],
)  # fmt: skip
def test_answers_are_words_or_places_within_2_cm(bench: Any, said: str, expected: str, right: bool) -> None:
    assert bench.agrees(said, expected) is right
