"""The operator as the verifier: both pictures, one key, a deadline. Silence is never a success."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from vlm2vla_client.errors import VerifierError
from vlm2vla_client.progress import printable
from vlm2vla_client.verifiers.base import Notes
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.types import Frame, Verdict

PAIR_GAP_PX = 8
MAX_PICTURE_PX = 1280


class Keys(Protocol):
    """Where the operator's key comes from."""

    def read(self, timeout_s: float) -> str | None:
        """The next key pressed from now on, or None after ``timeout_s``. Keys pressed before the call are dropped.

        Raises:
            VerifierError: nobody can press a key here.
        """
        ...


class TerminalKeys:
    """Single keys from a terminal, without Enter and without echo.

    Args:
        descriptor: the terminal's file descriptor; standard input when None.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor

    def read(self, timeout_s: float) -> str | None:
        """One key. What is no terminal (a pipe, a file) is refused: an answer prepared in advance is not a look."""
        with self._single_keys() as descriptor:
            ready, _, _ = select.select([descriptor], [], [], max(timeout_s, 0.0))
            data = os.read(descriptor, 1) if ready else None
        if data == b"":
            raise VerifierError("the terminal was closed", again=False)
        return None if data is None else data.decode("latin-1")

    @contextlib.contextmanager
    def _single_keys(self) -> Iterator[int]:
        try:
            descriptor = sys.stdin.fileno() if self._descriptor is None else self._descriptor
            before = termios.tcgetattr(descriptor)
        except (OSError, ValueError, termios.error):
            raise VerifierError("the verifier human needs a terminal on standard input", again=False) from None
        try:
            tty.setcbreak(descriptor, termios.TCSAFLUSH)  # flushes: a key pressed before the question is no answer
            yield descriptor
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def show_on_display(before: Frame, after: Frame, notes: Notes) -> None:
    """Opens both pictures side by side in the desktop's viewer, where there is a desktop; never waits for it."""
    opener = shutil.which("xdg-open")
    if opener is None or not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    path = notes.picture(after).parent.parent / "verify.jpg"
    try:
        path.write_bytes(side_by_side(before, after))
        quiet = subprocess.DEVNULL
        subprocess.Popen([opener, str(path)], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError:
        return  # the paths are on the terminal all the same


def side_by_side(before: Frame, after: Frame) -> bytes:
    """Both pictures in one JPEG, before on the left, as high as the higher one."""
    height = max(before.image.shape[0], after.image.shape[0])
    width = before.image.shape[1] + PAIR_GAP_PX + after.image.shape[1]
    pair = np.full((height, width, 3), 255, dtype=np.uint8)
    pair[: before.image.shape[0], : before.image.shape[1]] = before.image
    pair[: after.image.shape[0], width - after.image.shape[1] :] = after.image
    return encode_jpeg(pair, MAX_PICTURE_PX, MAX_PICTURE_PX)


class HumanVerifier:
    """Names both picture files, asks, and takes one key: y, n, or q to end the episode.

    Args:
        keys: where the key comes from.
        say: prints a line for the operator.
        show: puts the pictures on a display, if there is one.
    """

    name = "human"
    checks = True

    def __init__(
        self,
        *,
        keys: Keys | None = None,
        say: Callable[[str], None] | None = None,
        show: Callable[[Frame, Frame, Notes], None] = show_on_display,
    ) -> None:
        self._keys = keys or TerminalKeys()
        self._say = say or _say
        self._show = show
        self._notes: Notes | None = None

    def note_in(self, notes: Notes) -> None:
        """Takes the pictures' files from there."""
        self._notes = notes

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """The operator's word. Another key than y, n and q is asked for again; time runs on.

        Raises:
            VerifierError: no y or n within ``deadline_s``, or nobody can answer here.
            KeyboardInterrupt: q.
        """
        ends_s = time.monotonic() + deadline_s
        if self._notes is not None:
            self._notes.quiet()
            self._say(f"  before   {self._notes.picture(before)}")
            self._say(f"  after    {self._notes.picture(after)}")
            self._show(before, after, self._notes)
        following = f"; next: {printable(next_subtask)}" if next_subtask is not None else "; it is the last one"
        self._say(f"  done?    {printable(subtask)}{following}")
        self._say(f"           [y]es, [n]o and try again, [q]uit; within {deadline_s:.0f} s")
        while (left_s := ends_s - time.monotonic()) > 0:
            key = self._keys.read(left_s)
            if key is None:
                break
            if key.lower() in ("y", "n"):
                success = key.lower() == "y"
                return Verdict(success, "High", f"The operator pressed {key.lower()}.")
            if key.lower() == "q":
                raise KeyboardInterrupt
            self._say("           y, n or q, please")
        raise VerifierError(f"the operator gave no answer within {deadline_s:.0f} s")

    def close(self) -> None:
        """Nothing to free."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
