"""An operator at a terminal: a program on a pseudo-terminal of its own, its screen, and keys pressed at known times."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

CLIENT = "import sys; from vlm2vla_client.cli import main; sys.exit(main(sys.argv[1:]))"
END = b"\x00"
"""A terminal shows no such byte, and no program here prints it."""


class Seat:
    """Runs ``vlm2vla-client`` with a controlling terminal; use as a context manager. Standard error is the screen."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._operator, self._program = pty.openpty()
        self.before = termios.tcgetattr(self._program)
        self._screen = bytearray()
        program = self._program

        def take_terminal() -> None:
            fcntl.ioctl(program, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *arguments],
            stdin=self._program,
            stdout=self._program,
            stderr=self._program,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
        os.close(self._program)
        self._reader.join(5)
        os.close(self._operator)

    def _read(self) -> None:
        try:
            while data := os.read(self._operator, 4096):
                self._screen += data
        except OSError:
            return

    @property
    def screen(self) -> str:
        """Everything printed so far."""
        return bytes(self._screen).decode("utf-8", "replace")

    @property
    def mode(self) -> list[Any]:
        """The terminal's attributes now."""
        return termios.tcgetattr(self._program)

    def press(self, keys: str) -> float:
        """Presses keys; the time it was done."""
        os.write(self._operator, keys.encode())
        return time.monotonic()

    def hold_down(self, key: str, seconds: float, every_s: float = 0.03) -> float:
        """A key held down: its repeats, after the first press; the time of the last."""
        ends_s, last_s = time.monotonic() + seconds, 0.0
        while time.monotonic() < ends_s:
            last_s = self.press(key)
            time.sleep(every_s)
        return last_s

    def wait_for(self, text: str, timeout_s: float = 60.0, after: int = 0) -> int:
        """Waits until the screen shows ``text`` past position ``after``; the position behind it."""
        ends_s = time.monotonic() + timeout_s
        while time.monotonic() < ends_s:
            found = self.screen.find(text, after)
            if found >= 0:
                return found + len(text)
            if self.process.poll() is not None:
                self._read_all()
                if (found := self.screen.find(text, after)) >= 0:
                    return found + len(text)
                break
            time.sleep(0.01)
        raise AssertionError(f"{text!r} was not shown; the screen is:\n{self.screen}")

    def wait(self, timeout_s: float = 60.0) -> int:
        """The program's exit code; the screen holds all that it printed."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end; the screen is:\n{self.screen}") from None
        self._read_all()
        return code

    def _read_all(self) -> None:
        """Reads to the end of what an ended program printed: a mark behind it has come through the terminal."""
        os.write(self._program, END)
        while not self._screen.endswith(END) and self._reader.is_alive():
            time.sleep(0.001)
        if self._screen.endswith(END):
            del self._screen[-len(END) :]
