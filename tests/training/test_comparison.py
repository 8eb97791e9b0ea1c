import numpy as np
import pytest

from vlm2vla_training.analysis.comparison import aggregate, compare, gripper_events, plan_agreement
from vlm2vla_training.analysis.representations import Bins, Representations, least_likely
from vlm2vla_training.errors import DataError, UsageError

LOGGED = [[0.05, 0.0, 0.0, 1.0], [0.03, 0.0, -0.05, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_the_log_itself_is_a_perfect_prediction() -> None:
    found = compare(LOGGED, LOGGED, 1.0)
    assert found["axes_agree"] == 3 and found["end_error_mm"] == 0.0 and found["gripper_rows"] == [0]
    assert found["still_error_mm"] == pytest.approx(94.34, abs=0.01)


def test_errors_are_in_millimetres_and_rows() -> None:
    early = [[0.05, 0.03, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    found = compare(early, LOGGED, 1.0)
    assert found["axes_agree"] == 1  # forward; left is wrong, down is missing
    assert found["end_error_mm"] == pytest.approx(65.57, abs=0.01) and found["gripper_rows"] == [-1]


@pytest.mark.parametrize(
    ("grippers", "kind"),
    [([1.0, 1.0], "missed"), ([0.0], "match"), ([0.0, 1.0], "extra"), ([1.0, 0.0, 1.0, 0.0], "extra")],
)
def test_gripper_events_are_matched_in_order(grippers: list[float], kind: str) -> None:
    found = compare([[0.0, 0.0, 0.0, gripper] for gripper in grippers], LOGGED, 1.0)
    assert found["gripper"] == kind and (found["gripper_rows"] != []) == (kind == "match")


def test_an_opening_for_a_closing_is_neither_missed_nor_extra() -> None:
    opening, closing = [[0.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]]
    assert gripper_events(opening, 0.0) == [(0, True)] and gripper_events(closing, 1.0) == [(0, False)]
    assert compare([*opening, *closing], [*closing, *opening], 0.5)["gripper"] == "other"


def test_words_of_a_plan_are_held_against_the_log() -> None:
    assert plan_agreement("Move forward, right and upward.", LOGGED) == {"axes": 2, "named": 1, "opposite": 1}
    assert plan_agreement("Hold still.", [[0.0, 0.0, 0.01, 1.0]]) == {"axes": 0, "named": 0, "opposite": 0}


def test_rates_name_what_they_are_of() -> None:
    good = {"comparison": compare(LOGGED, LOGGED, 1.0), "plan_parsed": True, "plan_agreement": None}
    found = aggregate([good, {"comparison": None, "plan_parsed": False, "plan_agreement": None}])
    assert (found["parse_rate"], found["plan_parse_rate"], found["direction_agreement"]) == (0.5, 0.5, 1.0)
    assert found["gripper"]["match"] == found["gripper_events"] == 1 and found["plan_axes_named"] is None
    assert aggregate([])["parse_rate"] is None and aggregate([])["end_error_mm"] is None


def test_bins_cover_the_middle_of_the_data_and_hold_what_is_beyond() -> None:
    rows = np.stack([np.linspace(-0.05, 0.05, 1001)] * 3 + [np.arange(1001) % 2], axis=1).astype(np.float64)
    bins = Bins.of(rows, 256)
    assert bins.low[0] == pytest.approx(-0.049) and bins.high[:3] == pytest.approx([0.049] * 3)
    assert bins.numbers([[-0.3, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 1.0]]) == [0, 128, 255, 0, 128, 128, 128, 255]


def test_the_least_likely_are_taken_from_below_without_control_tokens() -> None:
    assert least_likely(np.array([0.0, 0.3, 0.1, 0.2]), frozenset({0}), 2) == [2, 3]
    with pytest.raises(DataError, match="2 tokens beside"):
        least_likely(np.array([0.0, 0.3, 0.1]), frozenset({0}), 3)


class SplittingTokenizer:
    """Knows no reserved tokens: every character is a token, as with a tokenizer that is not Gemma 3's."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_tokenizer_without_table_2_is_refused() -> None:
    bins = Bins((0.0,) * 4, (1.0,) * 4, 2)
    with pytest.raises(UsageError, match="no single token"):
        Representations(SplittingTokenizer(), bins, [7, 8])
    with pytest.raises(UsageError, match="1 tokens for 2 bins"):
        Representations(SplittingTokenizer(), bins, [7])
