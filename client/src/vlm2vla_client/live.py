"""A live view of a run beside the recording: everything that is recorded is shown as well, and nothing waits for it.

Whatever shows it (``Sink``) lives in a thread of its own behind a bounded queue. A slow one loses the oldest of what it
has not shown yet, a broken one is named once and then ignored; the loop and the arm never learn of either.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

QUEUE: Final = 256
CLOSE_S: Final = 3.0


class Sink(Protocol):
    """Something that shows a run. Called in one thread; may block and may raise."""

    def event(self, line: Mapping[str, Any]) -> None:
        """One line of ``events.jsonl``, or the safety limits with ``event`` "limits"."""
        ...

    def picture(self, jpeg: bytes, t_s: float) -> None:
        """A recorded frame, and when it was recorded (monotonic seconds, as ``t_s`` of the events)."""
        ...

    def close(self) -> None:
        """Shows what is left and lets go."""
        ...


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class LiveView:
    """Feeds a sink. ``event`` and ``picture`` return at once, whatever the sink does.

    Args:
        open_sink: called in the view's own thread.
        tell: hears of a failure, once.
        queue: how many events and pictures wait for a slow sink before the oldest are dropped.

    Attributes:
        dropped: how many were.
    """

    def __init__(self, open_sink: Callable[[], Sink], tell: Callable[[str], None] = _tell, queue: int = QUEUE) -> None:
        self._open_sink, self._tell = open_sink, tell
        self._waiting: deque[Callable[[Sink], None]] = deque(maxlen=queue)
        self._more, self._ending = threading.Event(), False
        self._lock = threading.Lock()
        self._failed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="live view", daemon=True)
        self._thread.start()

    def event(self, line: Mapping[str, Any]) -> None:
        """See :class:`Sink`."""
        self._put(lambda sink: sink.event(line))

    def picture(self, jpeg: bytes, t_s: float) -> None:
        """See :class:`Sink`."""
        self._put(lambda sink: sink.picture(jpeg, t_s))

    def close(self) -> None:
        """Lets the sink show what is left, for 3 s at the most. Safe to call twice."""
        self._ending = True
        self._more.set()
        self._thread.join(CLOSE_S)
        if self.dropped:
            self._tell(f"live view: too slow, {self.dropped} events or pictures were not shown; the recording has all")
            self.dropped = 0

    def _put(self, show: Callable[[Sink], None]) -> None:
        with self._lock:
            if self._failed or self._ending:
                return
            self.dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(show)
        self._more.set()

    def _run(self) -> None:
        try:
            sink = self._open_sink()
            while (show := self._next()) is not None:
                show(sink)
            sink.close()
        except Exception as error:  # whatever a viewer does wrong, the run goes on without it
            with self._lock:
                self._failed = True
                self._waiting.clear()
            self._tell(f"live view: {type(error).__name__}: {error}; the run goes on without it")

    def _next(self) -> Callable[[Sink], None] | None:
        while True:
            self._more.clear()
            with self._lock:
                if self._waiting:
                    return self._waiting.popleft()
            if self._ending:
                return None
            self._more.wait()
