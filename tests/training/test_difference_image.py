"""bench/difference_image.py: what the verifier of that experiment is shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bench_programs import program

from vlm2vla_training.curation.dataset import ExampleSet


@pytest.fixture
def bench() -> Iterator[Any]:
    with program("difference_image") as module:
        yield module


def test_the_picture_before_follows_from_the_difference_and_the_picture_after(bench: Any) -> None:
    before, after = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    shown = bench.difference(before, after)
    assert shown.dtype == np.uint8 and (bench.difference(after, after) == 128).all()
    told = after.astype(int) - 2 * (shown.astype(int) - 128)
    assert np.abs(told - before).max() <= 1


@pytest.mark.parametrize(
    ("how", "images"), [("first", [[3, 1], [4, 2], [3, 1]]), ("third", [[0, 1, 3], [1, 2, 4], [0, 1, 3]])]
)
def test_pictures_of_an_example(bench: Any, how: str, images: list[list[int]]) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    pairs = [[0, 1], [1, 2], [0, 1]]
    found = bench.with_difference(ExampleSet(frames, pairs, ["p"] * 3, ["c"] * 3, ["verify"] * 3, ["k"] * 3), how)
    assert found.images == images and found.pixels.shape == (5, 8, 8, 3)
    assert np.array_equal(found.pixels[[1, 4]], np.stack([frames[1], bench.difference(frames[1], frames[2])]))
