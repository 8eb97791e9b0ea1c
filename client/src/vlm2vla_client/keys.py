"""Single keys from the terminal: no Enter, no echo, and the terminal as it was before on every way out.

Ctrl-C stays what it is, a signal. Ctrl-Z, Ctrl-\\ and Ctrl-S are keys like any other meanwhile: a client that sleeps in
the background, died with the terminal unreadable, or waits for output to be let through could not be told to stop.
What nobody can mend from inside: after kill -9 the terminal stays silent until ``stty sane``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import sys
import termios
import time
from types import TracebackType
from typing import Any, Protocol

from vlm2vla_client.errors import ConfigurationError, SafetyStop

_MAX_BYTES = 4096
_DISABLED = b"\0"  # _POSIX_VDISABLE on Linux


class Keys(Protocol):
    """Where an operator's keys come from; entered while they are listened to."""

    def __enter__(self) -> Keys: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def pending(self) -> str:
        """What was pressed since the last look, oldest first; returns at once.

        Raises:
            SafetyStop: the terminal is gone, and with it the operator.
        """
        ...

    def wait(self, timeout_s: float) -> str | None:
        """The next key, or None after ``timeout_s``. Raises SafetyStop as ``pending`` does."""
        ...


def terminal_of_operator(descriptor: int | None = None) -> int | None:
    """Standard input's descriptor, when a person in front of it can press keys for this process; else None."""
    try:
        descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        # A process in the background may neither read nor set its terminal: the kernel would stop it.
        return descriptor if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp() else None
    except (OSError, ValueError, AttributeError):
        return None


def require_terminal(what: str) -> TerminalKeys:
    """The operator's keys. Raises ConfigurationError when there are none to be pressed; ``what`` needs them."""
    descriptor = terminal_of_operator()
    if descriptor is None:
        raise ConfigurationError(
            f"{what} needs an operator's keys: standard input is no terminal in the foreground; start it from one"
        )
    return TerminalKeys(descriptor)


class TerminalKeys:
    """The keys of a terminal. Entering twice is allowed: the outermost exit restores it.

    Args:
        descriptor: an open terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._depth = 0
        self._before: list[Any] | None = None
        self._kept = ""

    def __enter__(self) -> TerminalKeys:
        if self._depth == 0:
            try:
                self._listen()
            except termios.error as error:
                raise SafetyStop(f"the operator's terminal is gone ({error})") from None
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore()

    def _listen(self) -> None:
        mode = termios.tcgetattr(self._descriptor)
        if self._before is None:
            self._before = termios.tcgetattr(self._descriptor)
            atexit.register(self._restore)  # for a Ctrl-C that comes between here and the with statement's own exit
        mode[0] &= ~termios.IXON
        mode[3] = (mode[3] & ~(termios.ECHO | termios.ICANON)) | termios.ISIG
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        mode[6][termios.VSUSP] = mode[6][termios.VQUIT] = _DISABLED
        # NOW: a terminal whose output is stalled must keep neither the keys nor the way back waiting.
        termios.tcsetattr(self._descriptor, termios.TCSANOW, mode)

    def _restore(self) -> None:
        before = self._before
        if before is None:
            return
        with contextlib.suppress(termios.error, OSError):  # there may be no terminal left to restore
            termios.tcsetattr(self._descriptor, termios.TCSANOW, before)
        self._before = None
        atexit.unregister(self._restore)

    def pending(self) -> str:
        """See :class:`Keys`. Words typed before it was entered count, those of a finished line too."""
        keys, self._kept = self._kept, ""
        while self._ready(0.0):
            keys += self._read()
        return keys

    def wait(self, timeout_s: float) -> str | None:
        """See :class:`Keys`."""
        ends_s = time.monotonic() + timeout_s
        while not self._kept:
            left_s = ends_s - time.monotonic()
            if left_s <= 0.0 or not self._ready(left_s):
                return None
            self._kept += self._read()
        key, self._kept = self._kept[0], self._kept[1:]
        return key

    def _ready(self, timeout_s: float) -> bool:
        try:
            return bool(select.select([self._descriptor], [], [], timeout_s)[0])
        except (OSError, ValueError) as error:
            raise SafetyStop(f"the operator's terminal is gone ({error})") from None

    def _read(self) -> str:
        try:
            data = os.read(self._descriptor, _MAX_BYTES)
        except OSError as error:
            raise SafetyStop(f"the operator's terminal is gone ({error.strerror})") from None
        if not data:
            raise SafetyStop("the operator's terminal is gone (end of input)")
        return data.decode("latin-1")
