"""Settings for every test: time limits are stated by the tests that are about time, not by hypothesis' clock, so that
a busy machine cannot fail a property. And one order of loading."""

from __future__ import annotations

import contextlib
import importlib

import pytest
from hypothesis import settings

# Triton, which torch brings, ends the process when it is loaded after Mesa's software renderer has drawn.
with contextlib.suppress(ImportError):
    importlib.import_module("triton")

settings.register_profile("no-clock", deadline=None)
settings.load_profile("no-clock")

TRIES = 3
"""Of a test marked `clock`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A limit in wall time holds when it is kept once: a neighbour that takes both processors is no fault of ours."""
    for item in items:
        if item.get_closest_marker("clock") is not None:
            item.add_marker(pytest.mark.flaky(reruns=TRIES - 1))
