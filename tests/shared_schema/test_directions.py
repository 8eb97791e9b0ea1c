from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_schema.directions import DEGREES, IGNORED_BELOW_M, NAMES, degree, direction_words, join_words

OPPOSITE = {**dict(NAMES), **{negative: positive for positive, negative in NAMES}}
metres = st.floats(-0.5, 0.5)


@pytest.mark.parametrize(
    ("distance_m", "word"),
    [
        (0.010, "very slightly "),
        (0.0249, "very slightly "),
        (0.025, "slightly "),
        (0.0499, "slightly "),
        (0.050, ""),
        (0.0999, ""),
        (0.100, "far "),
        (3.0, "far "),
    ],
)
def test_a_degree_begins_at_its_bound(distance_m: float, word: str) -> None:
    assert degree(distance_m) == word


def test_bounds_rise_and_words_differ() -> None:
    bounds = [IGNORED_BELOW_M, *(bound for bound, _ in DEGREES)]
    assert bounds == sorted(set(bounds))
    assert len({degree(bound) for bound in bounds}) == len(bounds)


@pytest.mark.parametrize(
    ("delta_m", "words"),
    [
        ((0.12, 0.03, -0.07), ["far forward", "slightly left", "down"]),
        ((-0.12, -0.03, 0.07), ["far backward", "slightly right", "up"]),
        ((0.0, -0.02, 0.0), ["very slightly right"]),
        ((0.0099, -0.0099, 0.0099), []),
        ((0.010, 0.0, 0.0), ["very slightly forward"]),
    ],
)
def test_words_of_a_displacement(delta_m: tuple[float, float, float], words: list[str]) -> None:
    assert direction_words(delta_m) == words


def test_a_displacement_has_three_axes() -> None:
    with pytest.raises(ValueError):
        direction_words([0.1, 0.1])


@given(st.tuples(metres, metres, metres))
def test_turning_back_gives_the_opposite_words(delta_m: tuple[float, float, float]) -> None:
    there, back = direction_words(delta_m), direction_words([-value for value in delta_m])
    assert [_opposite(word) for word in there] == back


def _opposite(words: str) -> str:
    *degrees, name = words.split(" ")
    return " ".join([*degrees, OPPOSITE[name]])


@given(st.tuples(metres, metres, metres))
def test_no_digit_is_said_and_every_large_axis_is(delta_m: tuple[float, float, float]) -> None:
    words = direction_words(delta_m)
    assert not any(letter.isdigit() for letter in join_words(words))
    assert len(words) == sum(abs(value) >= IGNORED_BELOW_M for value in delta_m)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "none"),
        (["up"], "up"),
        (["up", "left"], "up and left"),
        (["forward", "slightly left", "down"], "forward, slightly left and down"),
    ],
)
def test_words_are_joined_as_in_a_sentence(words: list[str], text: str) -> None:
    assert join_words(words) == text
