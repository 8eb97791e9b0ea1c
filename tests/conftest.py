"""Settings for every test: time limits are stated by the tests that are about time, not by hypothesis' clock, so that
a busy machine cannot fail a property."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no-clock", deadline=None)
settings.load_profile("no-clock")
