"""What a verifier is: two pictures and two subtasks in, a verdict out (appendix D.5)."""

from __future__ import annotations

from typing import Protocol

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
