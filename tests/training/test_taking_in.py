"""Episodes taken in together come out as each does alone, whatever their neighbours hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from training_fakes import flat_image

from vlm2vla_training.episodes.base import binary_gripper
from vlm2vla_training.episodes.intake import ActionSource, IntakeOptions, IntakeReport, RawEpisode, Taken
from vlm2vla_training.episodes.taking_in import take_in, take_in_all

Change = Callable[[NDArray[np.float64], NDArray[np.float64]], None]


def raw(number: int, rows: int, change: Change | None = None, surplus: int = 0, said: str = " lift it ") -> RawEpisode:
    """An episode of random motions whose gripper lies anywhere."""
    random = np.random.default_rng(number)
    actions = random.uniform(-0.02, 0.02, (rows, 7))
    actions[:, 6] = random.choice([0.0, 0.04, 0.05, 0.5, 0.95, 0.97, 1.0], rows)
    states = random.uniform(-0.3, 0.3, (rows + surplus, 7))
    if change:
        change(actions, states)
    return RawEpisode(f"k{number}", said, "s", [flat_image()] * rows, actions, states, 0, {}, ("odd",))


def zero_last(actions: NDArray[np.float64], states: NDArray[np.float64]) -> None:
    actions[-1] = 0.0


def zero_first(actions: NDArray[np.float64], states: NDArray[np.float64]) -> None:
    actions[0, :6] = 0.0


def no_number(actions: NDArray[np.float64], states: NDArray[np.float64]) -> None:
    states[-1, 2] = np.nan


def infinite(actions: NDArray[np.float64], states: NDArray[np.float64]) -> None:
    actions[0, 0] = np.inf


def episodes() -> list[RawEpisode]:
    """Every way an episode can be, between ordinary ones of other lengths; a new list each time, as facts are kept."""
    ways: list[RawEpisode] = [
        raw(0, 1, zero_last),
        raw(1, 6, zero_last),
        raw(2, 1),
        raw(3, 5, zero_first),
        raw(4, 2, zero_last, surplus=1),
        raw(5, 4, said="  "),
        raw(6, 3, no_number, surplus=1),
        raw(7, 3)._replace(states=np.zeros((5, 7))),
        raw(8, 3)._replace(actions=np.zeros((3, 6))),
        raw(9, 2)._replace(images=[b"x", b"y"]),
        raw(10, 9, surplus=1),
        raw(11, 7, lambda actions, states: actions.fill(1e300)),
        raw(12, 1, zero_last),
    ]
    return ways


def plain(taken: Taken) -> tuple[object, ...]:
    episode = taken.episode
    if episode is None:
        return (taken.left_out, taken.traps, taken.gap_mm)
    values = (episode.actions.tolist(), episode.states.tolist(), len(episode.images), episode.instruction)
    return (episode.key, values, list(episode.facts.items()), taken.left_out, taken.traps, taken.gap_mm)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("actions", ["commanded", "reached"])
@pytest.mark.parametrize("spoilt", [False, True], ids=["finite", "not finite"])
def test_neighbours_change_nothing(actions: ActionSource, spoilt: bool) -> None:
    options = IntakeOptions(actions=actions)

    def given() -> list[RawEpisode]:
        return [*episodes(), *([raw(20, 4, infinite), raw(21, 3, no_number)] if spoilt else []), raw(22, 8)]

    together = [plain(one) for one in take_in_all(given(), options)]
    alone = [plain(take_in_all([one], options)[0]) for one in given()]
    assert together == alone and len(together) == len(given())
    reasons = [one.left_out.reason for one in take_in_all(given(), options) if one.left_out]
    assert reasons[:4] == ["no row left", "no instruction", "not finite", "lengths differ"]
    assert reasons[4:] == ["wrong shape", "not an image", "no row left", *(["not finite"] * 2 if spoilt else [])]


def test_each_row_gets_the_gripper_of_its_own_episode() -> None:
    given = [raw(number, 3 + number % 5, zero_last if number % 3 == 0 else None) for number in range(30, 90)]
    logged = [one.actions[:, 6].astype(np.float64) for one in given]
    for one, values in zip(take_in_all(given, IntakeOptions()), logged, strict=True):
        assert one.episode is not None
        left = values[: len(one.episode)]
        assert one.episode.actions[:, 6].tolist() == binary_gripper(left).tolist()
        assert ("gripper_between" in one.traps) == bool(((left >= 0.05) & (left <= 0.95)).any())


def test_the_gap_is_the_median_step_of_each_episode() -> None:
    given = [raw(number, number) for number in (1, 2, 5, 8)]
    for one, of in zip(take_in_all(given, IntakeOptions()), given, strict=True):
        apart = np.linalg.norm(np.diff(of.states[:, :3], axis=0) - of.actions[:-1, :3], axis=1)
        assert one.gap_mm == (None if len(apart) == 0 else pytest.approx(np.median(apart) * 1000, abs=1e-3))


def test_one_episode_is_reported() -> None:
    report = IntakeReport()
    assert take_in(raw(1, 6, zero_last), IntakeOptions(), report) is not None
    assert take_in(raw(5, 4, said=""), IntakeOptions(), report) is None
    found = report.to_json()
    assert found["left_out"] == {"no instruction": 1} and found["traps"]["odd"] == 2
    assert found["traps"]["zero_last_row_dropped"] == 1 and found["commanded_reached_gap_mm"] > 0
