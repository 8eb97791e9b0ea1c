"""bench/annotation_boundaries.py: what it takes for the truth; how well the rules find it, the benchmark prints."""

from __future__ import annotations

import numpy as np
import pytest
from bench_programs import program

NOTHING, CARROT = None, "carrot"


@pytest.mark.parametrize(
    ("held", "fraction", "end"),
    [
        ([NOTHING, CARROT, CARROT, NOTHING, NOTHING, NOTHING], [1, 0.3, 0.3, 1, 1, 1], 3),
        ([NOTHING, CARROT, NOTHING, NOTHING, CARROT, NOTHING, NOTHING, NOTHING], [1, *[0.3] * 4, 1, 1, 1], 5),
        ([CARROT, NOTHING, NOTHING, NOTHING, CARROT, NOTHING, NOTHING, NOTHING], [*[0.3] * 5, 1, 1, 1], 5),
        ([CARROT, NOTHING, NOTHING, NOTHING, CARROT, CARROT], [0.3, 1, 1, 1, 0.3, 0.3], 1),
        ([CARROT, CARROT], [0.3, 0.3], 2),
    ],
    ids=["let go", "contact lost for two rows", "fallen out, touched again", "taken hold of anew", "held to the end"],
)
def test_where_a_hold_ends(held: list[str | None], fraction: list[float], end: int) -> None:
    with program("annotation_boundaries") as bench:
        assert bench.hold_end(held, np.array(fraction, dtype=np.float64), held.index(CARROT)) == end
