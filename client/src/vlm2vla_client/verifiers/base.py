"""What a verifier is: two pictures and two subtasks in, a verdict out (appendix D.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlm2vla_schema.types import Frame, Verdict


class Verifier(Protocol):
    """Judges, after every chunk, whether the subtask is done.

    Attributes:
        name: as given to ``--verifier``.
        checks: False when it judges nothing (``none``); the run then says that nothing was verified.
    """

    @property
    def name(self) -> str: ...

    @property
    def checks(self) -> bool: ...

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """The verdict on ``subtask``, within ``deadline_s`` seconds.

        Args:
            before: the frame that the chunk was computed from.
            after: a fresh frame, taken after the arm settled.
            next_subtask: None for the last subtask.

        Raises:
            VerifierError: no verdict; the caller must never read that as a success.
        """
        ...

    def close(self) -> None:
        """Frees what it holds; may be called twice."""
        ...


@dataclass(frozen=True)
class Notes:
    """An episode's recording, as far as a verifier needs it.

    Attributes:
        record: appends an event, given its kind and its fields by name.
        picture: the file that holds a frame; stores it when it is not stored yet.
        quiet: ends what moves on the terminal, before a person is asked something there.
    """

    record: Callable[..., None]
    picture: Callable[[Frame], Path]
    quiet: Callable[[], None]


@runtime_checkable
class Noting(Protocol):
    """A verifier that records more than its verdict, or shows the recorded pictures."""

    def note_in(self, notes: Notes) -> None:
        """Called once when an episode starts."""
        ...
