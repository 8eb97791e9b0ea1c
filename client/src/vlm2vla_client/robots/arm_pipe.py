"""The client's end of the arm process: starts it, keeps its heartbeat, reads its lines, notices its silence."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vlm2vla_client.errors import RobotError

BEAT_S: Final = 0.05
SILENCE_S: Final = 0.3
ACK_WAIT_S: Final = 0.04
MAX_LINE_BYTES: Final = 4096
CLOSE_S: Final = 3.0


class ArmPipe:
    """One arm process. Every call but ``start`` and ``close`` returns within 50 ms; RobotError says what to do next."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command, self._environment = list(command), dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._heard_s = 0.0
        self._ended = False
        self._number = 0
        self._waiting: set[int] = set()
        self._acks: dict[int, str | None] = {}
        self._late: str | None = None
        self._fatal: str | None = None
        self._words: deque[str] = deque(maxlen=8)
        self.ready: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Start the process and wait until it has the arm and a first state; gives its ``ready`` line.

        Raises RobotError when it ends, says why it cannot, or needs more than ``timeout_s``.
        """
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in the terminal is ours: the arm process must live to hold
                bufsize=0,
            )
        except OSError as error:
            problem = f"cannot start {self._command[0]}: {error.strerror}; see [widowx] in client.toml"
            raise RobotError(problem) from None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        for target in (self._read, self._listen, self._beat):
            thread = threading.Thread(target=target, name=f"arm {target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._fatal or (self.ready and self._state), timeout_s)
            if self.ready is not None and self._state is not None and self._fatal is None and not self._ended:
                return self.ready
        if self._fatal is not None:
            raise RobotError(self._fatal)
        raise RobotError(self._end_text() if self._ended else f"the arm process was not ready in {timeout_s:.0f} s")

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and not self._ended

    def check(self) -> dict[str, Any]:
        """The newest state line.

        Raises RobotError for an ended or silent process, a fault of the arm, a hold that was not asked for, or a
        command that was refused after its call had returned.
        """
        self._alive()
        with self._changed:
            state, late, self._late = self._state, self._late, None
        if state is None:
            raise RobotError("not connected: call connect() first")
        if state.get("fault"):
            raise RobotError(f"the arm reports: {state['fault']}")
        if late is not None:
            raise RobotError(late)
        holding = state.get("holding")
        if holding and holding.get("by_itself"):
            raise RobotError(f"the arm holds by itself: {holding.get('reason')}; look at the arm, then start again")
        return state

    def newest(self) -> dict[str, Any] | None:
        """The newest state line, whatever it says."""
        return self._state

    def ask(self, operation: str, **fields: Any) -> None:
        """Send one request and wait up to 40 ms for its answer; a refusal that comes later is raised by ``check``."""
        self._alive()
        self._exchange(operation, fields)

    def hold(self, reason: str) -> None:
        """Ask for a hold, of a silent process too: it reads the request when it wakes.

        It supersedes what earlier commands may still answer. Raises RobotError when it cannot be sent or the process is
        silent; the heartbeat then ends, so that the process holds by itself as soon as it can.
        """
        with self._changed:
            self._late = None
        try:
            self._exchange("hold", {"reason": reason})
            self._alive()
        except RobotError:
            if self._process is not None:
                self._stop.set()
            raise

    def _exchange(self, operation: str, fields: Mapping[str, Any]) -> None:
        with self._changed:
            self._number += 1
            number = self._number
            self._waiting.add(number)
        self._send(op=operation, id=number, **fields)
        with self._changed:
            self._changed.wait_for(lambda: number in self._acks or self._ended, ACK_WAIT_S)
            self._waiting.discard(number)
            error = self._acks.pop(number, None)
        if error is not None:
            raise RobotError(error)

    def close(self) -> None:
        """Let the process hold and end; kill it when it does not. Safe to call twice."""
        process = self._process
        if process is None:
            return
        if self.running:
            with contextlib.suppress(RobotError):
                self._send(op="quit")
        self._stop.set()
        with self._writing, contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(CLOSE_S)
        for thread in self._threads:
            thread.join(1.0)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()

    # --- threads --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        buffer, descriptor = b"", process.stdout.fileno()
        while len(buffer) <= MAX_LINE_BYTES:
            piece = os.read(descriptor, 65536)
            if not piece:
                break
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                self._one(line)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _one(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            event = message["event"]
        except (ValueError, TypeError, KeyError):
            self._words.append(line[:200].decode(errors="replace"))
            return
        with self._changed:
            self._heard_s = time.monotonic()
            if event == "state":
                self._state = message
            elif event == "ready":
                self.ready = message
            elif event == "fatal":
                self._fatal = str(message.get("error"))
            elif event == "ack":
                self._acknowledge(message)
            self._changed.notify_all()

    def _acknowledge(self, message: dict[str, Any]) -> None:
        number = message.get("id")
        error = None if message.get("ok") is True else str(message.get("error"))
        if number in self._waiting:
            self._acks[number] = error
        elif error is not None:
            self._late = error

    def _listen(self) -> None:
        process = self._process
        assert process is not None and process.stderr is not None
        for line in process.stderr:
            text = line[:200].decode(errors="replace").strip()
            if text:
                self._words.append(text)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S) and not self._ended:
            with contextlib.suppress(RobotError):
                self._send(op="beat")

    # --- what is known --------------------------------------------------------------------------------------------

    def _send(self, **message: Any) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise RobotError("not connected: call connect() first")
        try:
            with self._writing:
                os.write(process.stdin.fileno(), json.dumps(message).encode() + b"\n")
        except (OSError, ValueError):
            raise RobotError(self._end_text() if self._ended else "the arm process takes no more requests") from None

    def _alive(self) -> None:
        if self._process is None:
            raise RobotError("not connected: call connect() first")
        if self._ended:
            raise RobotError(self._end_text())
        silent_s = time.monotonic() - self._heard_s
        if self.ready is not None and silent_s > SILENCE_S:
            raise RobotError(
                f"the arm process has been silent for {silent_s:.2f} s (limit {SILENCE_S} s); it holds when it misses "
                "our heartbeat. Look at the arm, then start again"
            )

    def _end_text(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.02)
        words = " | ".join(self._words)[-400:]
        return (
            f"the arm process ended (code {self._process.returncode}); the motors keep their last goal and their "
            f"torque. Look at the arm, then start again. It said: {words or 'nothing'}"
        )
