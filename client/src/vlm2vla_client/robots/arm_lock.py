"""A lock file that keeps two clients off one arm. The kernel releases it when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from vlm2vla_client.errors import RobotError


class ArmLock:
    """One per arm and machine.

    Args:
        name: the arm's name, or host and port of what drives it.
        folder: where the file lies; one place for all users of the machine.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        safe = "".join(letter if letter.isalnum() else "-" for letter in name)
        self.path = (folder or Path(tempfile.gettempdir())) / f"vlm2vla-arm-{safe}.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take it without waiting. Raises RobotError when another process has it, or the file cannot be opened."""
        if self._descriptor is not None:
            return
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RobotError(f"cannot open the arm's lock file {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise RobotError(
                f"another client has this arm (process {owner}, lock file {self.path}): end it, then start again"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        with contextlib.suppress(OSError):  # only its owner may; then the umask decided
            os.fchmod(descriptor, 0o666)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back. Safe to call twice; the file stays, since removing it could split the lock in two."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
