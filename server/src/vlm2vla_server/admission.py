"""Who may generate now: a bound on the number of requests, and the newest request of each episode."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from vlm2vla_server.errors import Overloaded
from vlm2vla_server.metrics import Metrics


class Admission:
    """At most `limit` requests generating or waiting for the engine; at most four times as many, and 16 more, sending
    their bodies. The surplus is refused at once: a robot is better served by a quick no than by a late yes."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._body_limit = 4 * limit + 16
        self._metrics = metrics
        self._generating = 0
        self._reading = 0
        self._typical_s = 1.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold while a body is read and parsed. Raises Overloaded."""
        if self._reading >= self._body_limit:
            raise Overloaded("too many requests are being received", retry_after_s=1)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Hold from admission to the answer. Raises Overloaded."""
        if self._generating >= self._limit:
            wait_s = min(60, max(1, math.ceil(self._typical_s)))
            raise Overloaded(
                f"{self._limit} requests are being served or waiting; try again in {wait_s} s", retry_after_s=wait_s
            )
        self._generating += 1
        self._metrics.in_flight.set(self._generating)
        began_s = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._generating -= 1
            self._metrics.in_flight.set(self._generating)
            took_s = asyncio.get_running_loop().time() - began_s
            self._typical_s += 0.2 * (took_s - self._typical_s)


class Ticket:
    """One generating request: its task, and why it was cancelled if it was."""

    def __init__(self, received_s: float) -> None:
        self.received_s = received_s
        self.superseded = False
        self.finished = asyncio.Event()
        self._task: asyncio.Task[object] | None = None

    def attach(self, task: asyncio.Task[object]) -> None:
        """Name the task that does the work; one already superseded is cancelled at once."""
        self._task = task
        if self.superseded:
            task.cancel()

    def supersede(self) -> None:
        """Cancel because a newer request of the same episode has come."""
        self.superseded = True
        if self._task is not None:
            self._task.cancel()


class Episodes:
    """The newest /actions or /cycle of every episode; an older one is cancelled."""

    def __init__(self) -> None:
        self._newest: dict[str, Ticket] = {}

    def enter(self, episode_id: str | None, ticket: Ticket) -> Ticket | None:
        """Register a request; returns the older one that it cancelled, if any. A request that arrives here after a
        newer one was registered is itself superseded."""
        if episode_id is None:
            return None
        other = self._newest.get(episode_id)
        if other is not None and other.received_s > ticket.received_s:
            ticket.supersede()
            return None
        self._newest[episode_id] = ticket
        if other is not None:
            other.supersede()
        return other

    def leave(self, episode_id: str | None, ticket: Ticket) -> None:
        """Forget a finished request."""
        ticket.finished.set()
        if episode_id is not None and self._newest.get(episode_id) is ticket:
            del self._newest[episode_id]
