"""The error tree of this package. Everything that a user can cause derives from `TrainingError`."""

from __future__ import annotations

from vlm2vla_schema.errors import VLM2VLAError


class TrainingError(VLM2VLAError):
    """Base of every error raised by vlm2vla_training."""


class UsageError(TrainingError):
    """A wrong argument or combination of arguments; the command exits 2."""


class DataError(TrainingError):
    """A dataset on disk is not what its format says: missing file, wrong width, broken row."""


class MissingExtraError(TrainingError):
    """An optional dependency is missing; the message names the extra to install."""
