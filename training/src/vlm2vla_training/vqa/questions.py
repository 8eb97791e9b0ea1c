"""The twin's own VQA benchmark: pictures of test seeds, questions whose answers the simulator knows.

Every question is asked twice about the same picture: in the words that the base was trained on, and in other words that
occur nowhere in its training. Yes and no are asked equally often; what a person could not tell is not asked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.pretrain_data import COLOURS, GRASPABLE, NAMES, still
from vlm2vla_twin.scene import CARDS, KINDS
from vlm2vla_twin.truth import Truth

FIRST_SEED = 1_000_000
TRAINED, OTHER = "trained", "other"
_APART_M = 0.03
_ARTICLE = re.compile(r"^(?:the|a|an)\s+")

Wordings = tuple[str, tuple[str, ...]]
# A kind makes, from the truth and a wish (0 or 1: which answer), what fills the gaps of its wordings, and the answer.
Maker = Callable[[Truth, np.random.Generator, int], tuple[dict[str, str], str] | None]


@dataclass(frozen=True)
class Question:
    """One question about one picture, uint8 [112, 112, 3]; `texts` by wording, "trained" and "other"."""

    number: int
    kind: str
    seed: int
    picture: NDArray[np.uint8]
    texts: dict[str, str]
    answer: str


def correct(said: str, answer: str) -> bool:
    """Whether an answer is right: case, outer punctuation and a leading article do not count, all else does."""
    return _plain(said) == _plain(answer)


def _plain(text: str) -> str:
    words = " ".join(text.casefold().split()).strip(" .,;:!?'\"")
    return _ARTICLE.sub("", words)


def _called(name: str) -> str:
    return f"{name} card" if name in CARDS else NAMES[name][0]


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _choice(random: np.random.Generator, names: Sequence[str]) -> str | None:
    return str(random.choice(list(names))) if names else None


def _there(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    there = [*truth.objects, *truth.cards]
    name = _choice(random, there if wish else [name for name in (*KINDS, *CARDS) if name not in there])
    return None if name is None else ({"a": _called(name)}, _yes(bool(wish)))


def _in_gripper(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    held = [name for name in truth.objects if name == truth.held]
    # A "no" is about a thing that lies there and could be held; half of them while something else is.
    name = _choice(random, held if wish else [name for name in truth.objects if name in GRASPABLE and name not in held])
    return None if name is None else ({"a": _called(name)}, _yes(bool(wish)))


def _fingers(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    is_open = truth.gripper_fraction > 0.8
    return ({}, "open" if is_open else "closed") if is_open == bool(wish) else None


def _left(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    pair = _pair(truth, random, lambda a, b: abs(a[1] - b[1]) >= _APART_M)
    if pair is None:
        return None
    right_to_left = sorted(pair, key=lambda name: truth.position(name)[1])
    a, b = reversed(right_to_left) if wish else right_to_left
    return {"a": _called(a), "b": _called(b)}, _yes(bool(wish))


def _nearer(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    def aside(place: tuple[float, ...]) -> float:
        return float(np.hypot(place[0] - truth.gripper_m[0], place[1] - truth.gripper_m[1]))

    pair = _pair(truth, random, lambda a, b: abs(aside(a) - aside(b)) >= _APART_M)
    if pair is None:
        return None
    near, far = sorted(pair, key=lambda name: aside(truth.position(name)))
    a, b = (near, far) if wish else (far, near)
    return {"a": _called(a), "b": _called(b)}, _called(near)


def _pair(
    truth: Truth, random: np.random.Generator, apart: Callable[[tuple[float, ...], tuple[float, ...]], bool]
) -> tuple[str, str] | None:
    things = [str(name) for name in random.permutation([*truth.objects, *truth.cards])]
    for index, one in enumerate(things):
        for two in things[index + 1 :]:
            if apart(truth.position(one), truth.position(two)):
                return one, two
    return None


def _held(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    if (truth.held is not None) != bool(wish):
        return None
    return {}, "nothing" if truth.held is None else _called(truth.held)


def _colour(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    name = _choice(random, list(truth.objects))
    return None if name is None else ({"a": _called(name)}, COLOURS[name])


def _count(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    return {}, str(len(truth.objects))


def _above(truth: Truth, random: np.random.Generator, wish: int) -> tuple[dict[str, str], str] | None:
    cards = [card for card in truth.cards if truth.above_card(card) is not None]
    card = _choice(random, cards)
    item = None if card is None else truth.above_card(card)
    return None if card is None or item is None else ({"a": card}, _called(item))


QUESTIONS: dict[str, tuple[Maker, Wordings]] = {
    "is it there": (
        _there, ("Is there a {a} in the picture?", ("Can you see a {a}?", "Does the picture show a {a}?")),
    ),
    "is it held": (
        _in_gripper,
        ("Is the {a} in the gripper?", ("Is the gripper holding the {a}?", "Does the gripper hold the {a}?")),
    ),
    "open or closed": (
        _fingers,
        ("Is the gripper open or closed?", ("Are the fingers open or closed?", "Is the gripper closed or open?")),
    ),
    "left or right": (
        _left,
        ("Is the {a} left of the {b}?", ("Is the {a} to the left of the {b}?", "Is the {b} to the right of the {a}?")),
    ),
    "which is nearer": (
        _nearer,
        (
            "Which is nearer to the gripper, the {a} or the {b}?",
            ("Which one is closer to the gripper, the {a} or the {b}?", "Is the {a} or the {b} nearer to the gripper?"),
        ),
    ),
    "what is held": (
        _held, ("What is the gripper holding?", ("What does the gripper hold?", "Which object is in the gripper?")),
    ),
    "colour": (
        _colour, ("What colour is the {a}?", ("What is the colour of the {a}?", "Which colour does the {a} have?")),
    ),
    "how many": (
        _count,
        (
            "How many objects are on the counter, cards not counted?",
            (
                "How many things lie on the counter, without the cards?",
                "Count the objects on the counter, not the cards.",
            ),
        ),
    ),
    "above a card": (
        _above, ("Which item is above the {a}?", ("What lies above the {a}?", "Which object is right above the {a}?")),
    ),
}  # fmt: skip
"""Kind -> what makes its answers, and its wordings: the trained one, then others, used in turn."""


def questions(count: int, first_seed: int = FIRST_SEED) -> list[Question]:
    """`count` questions of each kind, each about a picture of its own; the same arguments give the same questions.

    Args:
        count: questions of each kind.
        first_seed: seeds below 1,000,000 have been trained or tuned on.
    """
    left = Counter(dict.fromkeys(QUESTIONS, count))
    made: list[Question] = []
    seed = first_seed
    while left.total():
        shown, random = still(seed), np.random.default_rng([11, seed])
        seed += 1
        if shown is None:
            continue
        # The kind that lacks most comes first; ties go by the table's order.
        for kind in sorted((kind for kind in QUESTIONS if left[kind]), key=lambda kind: -left[kind]):
            maker, (trained, others) = QUESTIONS[kind]
            done = count - left[kind]
            found = maker(shown[1], random, done % 2)
            if found is None:
                continue
            gaps, answer = found
            texts = {TRAINED: trained.format(**gaps), OTHER: others[done // 2 % len(others)].format(**gaps)}
            made.append(Question(len(made), kind, seed - 1, shown[0], texts, answer))
            left[kind] -= 1
            break
    return made


def constant_answer(answers: Sequence[str]) -> float:
    """The accuracy of whoever always gives the most frequent answer: what looking at the picture must beat."""
    return max(Counter(answers).values()) / len(answers)
