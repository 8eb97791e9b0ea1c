"""An answer read by a thread of its own: every event carries the moment of its arrival, and no wait is endless."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import ClientError, ServerUnreachableError
from vlm2vla_client.policies.base import Answered, CycleEvent

GRACE_S = 3.0
POLL_S = 0.1


class Arrivals:
    """Iterates over ``(event, arrived_s)`` of one answer.

    Rows that arrive while the arm executes earlier ones keep their true age: it is taken here, not when they are used.

    Args:
        events: the policy's iterator; read, and closed, by the thread.
        clock: stamps the arrivals.
        deadline_s: wall seconds for the whole answer; a little is added so that the policy can report its own timeout.
        check: called every 0.1 s of waiting; raises to end it, for the arm may be on its way meanwhile.
    """

    def __init__(
        self,
        events: Iterator[CycleEvent],
        clock: Clock,
        deadline_s: float,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._events = events
        self._clock = clock
        self._deadline_s = deadline_s
        self._check = check
        self._ends_s = time.monotonic() + deadline_s + GRACE_S
        self._queue: queue.SimpleQueue[tuple[CycleEvent, float] | BaseException] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._failed: ClientError | None = None
        threading.Thread(target=self._read, name="answer", daemon=True).start()

    def _read(self) -> None:
        try:
            for event in self._events:
                self._queue.put((event, self._clock.now_s()))
                if self._given_up.is_set() or isinstance(event, Answered):
                    break
            else:
                raise ServerUnreachableError("the answer ended before it was complete", code="stream_cut")
        except BaseException as error:  # handed to the thread that asked, whatever it is
            self._failed = error if isinstance(error, ClientError) else None
            self._queue.put(error)
        finally:
            close = getattr(self._events, "close", None)
            if close is not None:
                close()

    def __iter__(self) -> Iterator[tuple[CycleEvent, float]]:
        """Events in order, ending after ``Answered``.

        Raises:
            PolicyError: what the policy raised, or a timeout.
        """
        while True:
            item = self._next()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item[0], Answered):
                return

    def _next(self) -> tuple[CycleEvent, float] | BaseException:
        while True:
            left_s = self._ends_s - time.monotonic()
            try:
                return self._queue.get(timeout=max(min(left_s, POLL_S), 0.001))
            except queue.Empty:
                if self._check is not None:
                    self._check()
                if left_s <= 0:
                    self.give_up()
                    raise ServerUnreachableError(
                        f"no complete answer within {self._deadline_s + GRACE_S:g} s", code="timeout"
                    ) from None

    def failed(self) -> ClientError | None:
        """How the answer ended badly, known before the rows that arrived until then are taken. Returns at once."""
        return self._failed

    def give_up(self) -> None:
        """Nobody waits for this answer any more; the thread ends at its next event or timeout."""
        self._given_up.set()
