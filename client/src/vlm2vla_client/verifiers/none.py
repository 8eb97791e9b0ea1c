"""No verification: every executed chunk moves on to the next subtask, and the summary says so."""

from __future__ import annotations

from vlm2vla_schema.types import Frame, Verdict


class NoVerifier:
    """Calls every executed chunk done, with the lowest confidence and the reason in plain words."""

    name = "none"
    checks = False

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """Always moves on; never raises."""
        return Verdict(success=True, confidence="Low", reasoning="Nothing was verified: the verifier is 'none'.")

    def close(self) -> None:
        """Nothing to free."""
