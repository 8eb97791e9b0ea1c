"""Several verifiers in order: hold, retry, next in the chain; an error is never a success (contracts, "The loop")."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from vlm2vla_client.errors import VerifierError
from vlm2vla_client.verifiers.base import Notes, Noting, Verifier
from vlm2vla_schema.types import Frame, Verdict

OnFailure = Callable[[str, VerifierError], None]

MEMBER_DEADLINE_S = 60.0
"""Seconds that a verdict may take for each member of a chain."""


class ChainVerifier:
    """Asks each verifier up to ``attempts`` times before it turns to the next.

    Args:
        verifiers: at least one.
        attempts: tries of each.
        on_failure: called with the verifier's name and the error after every failed try (the run holds and records).
    """

    def __init__(
        self, verifiers: Sequence[Verifier], *, attempts: int = 2, on_failure: OnFailure | None = None
    ) -> None:
        if not verifiers:
            raise ValueError("a chain needs at least one verifier")
        self._verifiers = tuple(verifiers)
        self._attempts = attempts
        self._on_failure = on_failure

    @property
    def name(self) -> str:
        """The members' names, joined by commas."""
        return ",".join(verifier.name for verifier in self._verifiers)

    @property
    def checks(self) -> bool:
        """True when every member really checks: a chain that may end in ``none`` cannot promise a verdict."""
        return all(verifier.checks for verifier in self._verifiers)

    def on_failure(self, callback: OnFailure) -> None:
        """Sets the callback; the loop does this when an episode starts."""
        self._on_failure = callback

    def note_in(self, notes: Notes) -> None:
        """Hands the recording to the members that want it."""
        for verifier in self._verifiers:
            if isinstance(verifier, Noting):
                verifier.note_in(notes)

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """The first verdict that any member gives.

        ``deadline_s`` bounds the whole chain, and each member gets an equal share of what is left: one that is silent
        to its end leaves time for the next.

        Raises:
            VerifierError: no member gave one in time.
        """
        ends_s = time.monotonic() + deadline_s
        failures: list[str] = []
        for index, verifier in enumerate(self._verifiers):
            now_s = time.monotonic()
            if now_s >= ends_s:
                raise VerifierError(f"no verdict within {deadline_s:g} s ({'; '.join(failures)})")
            share_ends_s = now_s + (ends_s - now_s) / (len(self._verifiers) - index)
            for _ in range(self._attempts):
                left_s = share_ends_s - time.monotonic()
                if left_s <= 0:
                    break
                try:
                    return self._ask(verifier, before, after, subtask, next_subtask, left_s)
                except VerifierError as error:
                    failures.append(f"{verifier.name}: {error}")
                    if self._on_failure is not None:
                        self._on_failure(verifier.name, error)
                    if not error.again:
                        break
        raise VerifierError("no verifier gave a verdict: " + "; ".join(failures))

    @staticmethod
    def _ask(
        verifier: Verifier, before: Frame, after: Frame, subtask: str, next_subtask: str | None, left_s: float
    ) -> Verdict:
        try:
            verdict = verifier.verify(before, after, subtask, next_subtask, left_s)
        except VerifierError:
            raise
        except Exception as error:  # a plug-in's own exception must not end in a success, nor end the run
            raise VerifierError(f"{type(error).__name__}: {error}") from error
        if not isinstance(verdict, Verdict):
            raise VerifierError(f"expected a Verdict, received {type(verdict).__name__}")
        return verdict

    def close(self) -> None:
        """Closes every member."""
        for verifier in self._verifiers:
            verifier.close()
