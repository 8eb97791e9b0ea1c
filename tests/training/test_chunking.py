import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_training.curation.chunking import chunk_actions
from vlm2vla_training.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"

axis = st.integers(-60, 60).map(lambda millimetres: millimetres / 1000)
row = st.tuples(axis, axis, axis, st.sampled_from([0.0, 1.0])).map(list)
rows = st.lists(row, max_size=40)


def test_the_printed_example_of_b2() -> None:
    golden = json.loads((GOLDEN / "b2_chunking.json").read_text())
    assert chunk_actions(golden["before"]) == golden["after"]


def test_seven_dim_rows_lose_their_rotation() -> None:
    assert chunk_actions([[0.01, 0.0, 0.0, 9.0, 9.0, 9.0, 1.0], [0.01, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]) == [
        [0.02, 0.0, 0.0, 1.0]
    ]


def test_float_noise_at_the_limit_does_not_split() -> None:
    assert chunk_actions([[0.01, 0.0, 0.0, 1.0]] * 5) == [[0.05, 0.0, 0.0, 1.0]]


def test_a_large_logged_row_stays_alone() -> None:
    big = [0.08, 0.0, 0.0, 1.0]
    small = [0.01, 0.0, 0.0, 1.0]
    assert chunk_actions([small, big, small]) == [small, big, small]


def test_flush_mode_closes_at_the_single_axis_threshold() -> None:
    assert chunk_actions([[0.01, 0.0, 0.0, 1.0]] * 5, mode="flush") == [[0.03, 0.0, 0.0, 1.0], [0.02, 0.0, 0.0, 1.0]]


@given(rows)
def test_sums_are_kept(actions: list[list[float]]) -> None:
    chunks = chunk_actions(actions)
    for column in range(3):
        total = sum(action[column] for action in actions)
        assert sum(chunk[column] for chunk in chunks) == pytest.approx(total, abs=0.0005 * max(1, len(chunks)))


@given(rows)
def test_no_chunk_crosses_a_sign_a_gripper_or_the_limit(actions: list[list[float]]) -> None:
    chunks = chunk_actions(actions)
    position = 0
    for chunk in chunks:
        # Millimetre input sums exactly, so the rows of a chunk can be found again by counting up to its sum.
        members = [actions[position]]
        while [round(sum(m[c] for m in members), 3) + 0.0 for c in range(3)] + [members[0][3]] != chunk:
            members.append(actions[position + len(members)])
        position += len(members)
        while position < len(actions) and actions[position] == [0.0, 0.0, 0.0, chunk[3]]:
            position += 1  # a zero row is neutral and belongs to the chunk before it
        assert len({member[3] for member in members}) == 1
        for column in range(3):
            assert len({member[column] > 0 for member in members if member[column] != 0}) <= 1
            assert len(members) == 1 or abs(chunk[column]) <= 0.05 + 1e-9
    assert position == len(actions)


@given(st.lists(st.floats(-0.049, 0.049), min_size=1, max_size=20))
def test_never_minus_zero(values: list[float]) -> None:
    for chunk in chunk_actions([[value, 0.0, -value, 1.0] for value in values]):
        assert all(str(value) != "-0.0" for value in chunk)


@pytest.mark.parametrize("bad", [[0.0, 0.0, 1.0], [float("nan"), 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.5]])
def test_bad_rows_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError):
        chunk_actions([bad])
