"""The operator's key while a policy moves the arm: SPACE (or any key) holds; or the arm moves only while one is held.

Both are monitors of the executor, asked before every substep (at most 0.1 s) and in every wait (0.02 s), so the arm is
held within a substep of the key. They listen only while the arm moves: between chunks the terminal belongs to
``--confirm`` and to the human verifier. What a terminal cannot do: it has no key-up. ``HoldToRun`` lives from the
keyboard's repeats, notices a release only when they have been missing for 0.5 s, and knows no repeat rate.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

from vlm2vla_client.errors import SafetyStop
from vlm2vla_client.keys import Keys, TerminalKeys, require_terminal, terminal_of_operator

SPACE: Final = " "
#: No repeat of the held key for this long is a release. Repeats come every 20..50 ms once they have begun.
RELEASED_S: Final = 0.5
#: The first repeat comes 0.25..1 s after the press (each desktop's own delay): motion begins with repeats this close.
REPEAT_S: Final = 0.2
REPEATS_TO_START: Final = 3
#: Keys that follow the one that held are the same press, or the same fright.
QUIET_S: Final = 0.5
RESUME_DEADLINE_S: Final = 600.0

Say = Callable[[str], None]


class Operator(Protocol):
    """A person beside the arm, as the loop knows one."""

    def moving(self) -> AbstractContextManager[None]:
        """Listens while the block runs. May wait for the operator before it begins (hold to run)."""
        ...

    def fault(self) -> str | None:
        """Why the arm must stop, or None; always None outside ``moving``. Returns at once."""
        ...

    @property
    def held(self) -> bool:
        """Whether the last motion was stopped by the operator."""
        ...

    def resume(self) -> None:
        """Waits until the operator lets it go on.

        Raises:
            KeyboardInterrupt: the operator ended the run.
            SafetyStop: no answer in ten minutes, or the terminal is gone.
        """
        ...


class NoOperator:
    """Nobody can press a key here; Ctrl-C and signals still stop the run."""

    held = False

    def moving(self) -> AbstractContextManager[None]:
        """Listens to nobody."""
        return contextlib.nullcontext()

    def fault(self) -> str | None:
        """Never a fault."""
        return None

    def resume(self) -> None:
        """Never called: nothing is ever held."""


def say_to_operator(line: str) -> None:
    """One line on standard error. Called only while the arm stands: a stalled terminal may block it."""
    print(line, file=sys.stderr, flush=True)


class SpaceHolds:
    """Any key pressed while the arm moves holds it; of what was pressed before, only SPACE does.

    Any key, because a frightened hand does not find one; before the motion, because an Enter too many is no fright.
    """

    def __init__(self, keys: Keys, say: Say = say_to_operator) -> None:
        self._keys, self._say = keys, say
        self._listening = False
        self._reason: str | None = None

    @property
    def held(self) -> bool:
        """See :class:`Operator`."""
        return self._reason is not None

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """See :class:`Operator`."""
        self._reason = None
        with self._keys:
            self._begin()
            self._listening = True
            try:
                yield
            finally:
                self._listening = False

    def fault(self) -> str | None:
        """See :class:`Operator`."""
        if self._listening and self._reason is None:
            try:
                self._reason = self._look(self._keys.pending())
            except SafetyStop as gone:
                self._reason = str(gone)
        return self._reason if self._listening else None

    def resume(self) -> None:
        """SPACE or Enter goes on, ``q`` ends the run; keys of the press that held do not count."""
        with self._keys:
            self._say("  held     SPACE or Enter: go on, planned anew from a fresh picture; q: end the run")
            wait_until_quiet(self._keys)
            ends_s = time.monotonic() + RESUME_DEADLINE_S
            while (left_s := ends_s - time.monotonic()) > 0.0:
                key = self._keys.wait(left_s)
                if key is not None and key in " \r\n":
                    self._reason = None
                    return
                if key is not None and key.lower() == "q":
                    raise KeyboardInterrupt
        raise SafetyStop(f"held by the operator, and nobody went on within {RESUME_DEADLINE_S:.0f} s")

    def _begin(self) -> None:
        if SPACE in self._keys.pending():
            self._reason = "held by the operator (SPACE before the motion)"

    def _look(self, pressed: str) -> str | None:
        return "held by the operator (key)" if pressed else None


class HoldToRun(SpaceHolds):
    """The arm moves only while SPACE is held down; another key holds at once, a release after 0.5 s."""

    def __init__(self, keys: Keys, say: Say = say_to_operator) -> None:
        super().__init__(keys, say)
        self._seen_s = 0.0

    def _begin(self) -> None:
        """Waits until SPACE repeats. Raises as ``resume`` does, and KeyboardInterrupt for ``q``."""
        self._keys.pending()  # an old press is no hand on the key
        self._say("  move     hold SPACE down; letting go holds the arm; q: end the run")
        ends_s, repeats = time.monotonic() + RESUME_DEADLINE_S, 0
        while time.monotonic() < ends_s:
            key = self._keys.wait(REPEAT_S)
            if key is not None and key.lower() == "q":
                raise KeyboardInterrupt
            repeats = repeats + 1 if key == SPACE else 0
            if repeats > REPEATS_TO_START:
                self._seen_s = time.monotonic()
                return
        raise SafetyStop(f"nobody held SPACE down within {RESUME_DEADLINE_S:.0f} s")

    def _look(self, pressed: str) -> str | None:
        now_s = time.monotonic()
        if pressed.strip(SPACE):
            return "held by the operator (another key)"
        if pressed:
            self._seen_s = now_s
        if now_s - self._seen_s > RELEASED_S:
            return f"held by the operator (SPACE was let go, no repeat for {RELEASED_S} s)"
        return None


def key_of_operator(keys: Keys) -> str:
    """The next key, while the arm stands.

    Raises:
        KeyboardInterrupt: it is ``q``.
        SafetyStop: none in ten minutes, or the terminal is gone.
    """
    key = keys.wait(RESUME_DEADLINE_S)
    if key is None:
        raise SafetyStop(f"no key for {RESUME_DEADLINE_S:.0f} s; the arm holds, nothing was written")
    if key == "q":
        raise KeyboardInterrupt
    return key


def wait_until_quiet(keys: Keys) -> None:
    """Drops keys until none has come for half a second."""
    keys.pending()
    while keys.wait(QUIET_S) is not None:
        keys.pending()


def operator_of_run(hold_to_run: bool) -> Operator:
    """The operator in front of this terminal.

    Raises:
        ConfigurationError: ``--hold-to-run`` without a terminal.
    """
    if hold_to_run:
        return HoldToRun(require_terminal("--hold-to-run"))
    descriptor = terminal_of_operator()
    return NoOperator() if descriptor is None else SpaceHolds(TerminalKeys(descriptor))
