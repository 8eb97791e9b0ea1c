"""Settings for every test: time limits are stated by the tests that are about time, not by hypothesis' clock, so that
a busy machine cannot fail a property. And one order of loading."""

from __future__ import annotations

import contextlib
import importlib

from hypothesis import settings

# Triton, which torch brings, ends the process when it is loaded after Mesa's software renderer has drawn.
with contextlib.suppress(ImportError):
    importlib.import_module("triton")

settings.register_profile("no-clock", deadline=None)
settings.load_profile("no-clock")
