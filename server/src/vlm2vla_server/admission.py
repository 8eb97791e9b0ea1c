"""Who may generate now: a bounded queue by what robots wait for, and the newest request of an episode.

An engine gets as many requests at a time from here as it runs at once (`EngineInfo.slots`: 1 for transformers, vLLM's
batch); what waits is ordered by what it is for, then so that no robot waits behind many requests of another, then by
arrival. What runs is never interrupted for something more urgent.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

from vlm2vla_server.errors import Cancelled, Overloaded, ServerError
from vlm2vla_server.metrics import Metrics
from vlm2vla_server.policy import Clocking

MAX_ROBOTS = 1024
"""Robots whose last turn is remembered."""
MAX_RETRY_AFTER_S = 60


class Priority(IntEnum):
    """What a request is for; lower goes first. A robot stands still until it can act, and then until it is verified."""

    ACT = 0
    VERIFY = 1
    ASK = 2


_PRIORITIES = {
    "/cycle": Priority.ACT,
    "/actions": Priority.ACT,
    "/motion_plan": Priority.ACT,
    "/subtasks": Priority.ACT,
    "/act": Priority.ACT,
    "/verify": Priority.VERIFY,
}


def priority_of(path: str) -> Priority:
    """The priority of an endpoint; /vqa, /v1 and whatever is not named come last."""
    return _PRIORITIES.get(path, Priority.ASK)


class Ticket:
    """One generating request: what it is for, its task, and why it was ended if it was.

    robot: whose request it is: its episode, or the caller's address. model: for metrics.
    """

    def __init__(
        self,
        received_s: float,
        clocking: Clocking | None = None,
        priority: Priority = Priority.ASK,
        robot: str = "",
        model: str = "unknown",
    ) -> None:
        self.received_s = received_s
        self.clocking = clocking if clocking is not None else Clocking(received_s, math.inf)
        self.priority = priority
        self.robot = robot
        self.model = model
        self.finished = asyncio.Event()
        self.problem: ServerError | None = None
        self.reason: str | None = None
        self._task: asyncio.Task[object] | None = None

    def attach(self, task: asyncio.Task[object]) -> None:
        """Name the task that does the work; one already ended is cancelled at once."""
        self._task = task
        if self.problem is not None:
            task.cancel()

    def supersede(self) -> None:
        """End because a newer request of the same episode has come."""
        self.end("superseded", Cancelled("a newer request of the same episode took this one's place"))

    def end(self, reason: str, problem: ServerError) -> None:
        """Cancel the work; its caller gets `problem`. The first reason stands."""
        if self.problem is None:
            self.reason, self.problem = reason, problem
            if self._task is not None:
                self._task.cancel()


@dataclass(eq=False)
class _Waiter:
    ticket: Ticket
    number: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """At most `limit` requests generating or waiting for their turn; at most four times as many, and 16 more, sending
    their bodies. The surplus is refused at once: a robot is better served by a quick no than by a late yes."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._body_limit = 4 * limit + 16
        self._metrics = metrics
        self._slots = 0
        self._running = 0
        self._reading = 0
        self._arrivals = 0
        self._waiting: list[_Waiter] = []
        self._last_turns: OrderedDict[str, int] = OrderedDict()
        self._turns = 0
        self._typical_s = 1.0

    def set_slots(self, slots: int) -> None:
        """How many requests the engine works on at once; 0 lets all in that are admitted."""
        self._slots = slots

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

    @asynccontextmanager
    async def generating(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for the turn, then hold until the answer is there; `ticket.clocking.queued_s` says how long it waited.

        Raises Overloaded; TimeoutError when the deadline passes in the queue.
        """
        arrived_s = time.monotonic()
        await self._enter(ticket)
        began_s = time.monotonic()
        ticket.clocking.queued_s = began_s - arrived_s
        self._metrics.queue_seconds.labels(ticket.priority.name.lower()).observe(began_s - arrived_s)
        try:
            yield
        finally:
            self._running -= 1
            self._typical_s += 0.2 * (time.monotonic() - began_s - self._typical_s)
            self._next()

    async def _enter(self, ticket: Ticket) -> None:
        if self._running + len(self._waiting) >= self._limit:
            self._make_room(ticket.priority)
        if not self._waiting and self._has_slot():
            self._start(ticket)
            return
        self._arrivals += 1
        waiter = _Waiter(ticket, self._arrivals)
        self._waiting.append(waiter)
        self._count()
        try:
            async with asyncio.timeout(max(0.0, ticket.clocking.deadline_s - time.monotonic())):
                await waiter.turn
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._count()
            elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._running -= 1  # the turn came in the same moment as the end
                self._next()
            raise

    def _make_room(self, priority: Priority) -> None:
        """A full queue refuses, unless somebody waits with a lower priority: then that one is refused instead."""
        wait_s = self._retry_after_s()
        problem = Overloaded(
            f"{self._limit} requests are being served or waiting; try again in {wait_s} s", retry_after_s=wait_s
        )
        last = max(self._waiting, key=lambda one: (one.ticket.priority, one.number), default=None)
        if last is None or last.ticket.priority <= priority:
            raise problem
        self._waiting.remove(last)
        if not last.turn.done():
            last.turn.set_exception(problem)

    def _retry_after_s(self) -> int:
        rounds = math.ceil((len(self._waiting) + 1) / self._slots) if self._slots else 1
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._typical_s * rounds)))

    def _has_slot(self) -> bool:
        return self._slots == 0 or self._running < self._slots

    def _next(self) -> None:
        while self._waiting and self._has_slot():
            best = min(self._waiting, key=self._order)
            self._waiting.remove(best)
            if not best.turn.done():  # one that was cancelled has not taken itself out yet
                self._start(best.ticket)
                best.turn.set_result(None)
        self._count()

    def _order(self, waiter: _Waiter) -> tuple[int, int, int]:
        ticket = waiter.ticket
        return ticket.priority, self._last_turns.get(ticket.robot, 0), waiter.number

    def _start(self, ticket: Ticket) -> None:
        self._running += 1
        self._turns += 1
        self._last_turns[ticket.robot] = self._turns
        self._last_turns.move_to_end(ticket.robot)
        while len(self._last_turns) > MAX_ROBOTS:
            self._last_turns.popitem(last=False)
        self._count()

    def _count(self) -> None:
        self._metrics.in_flight.set(self._running + len(self._waiting))
        self._metrics.queued.set(len(self._waiting))


class Episodes:
    """Every request at work, and the newest /actions or /cycle of every episode; an older one is cancelled."""

    def __init__(self) -> None:
        self._newest: dict[str, Ticket] = {}
        self._present: set[Ticket] = set()

    @property
    def busy(self) -> bool:
        """Whether any request is at work."""
        return bool(self._present)

    def enter(self, episode_id: str | None, ticket: Ticket) -> Ticket | None:
        """Register a request; returns the older one that it cancelled, if any. A request that arrives here after a
        newer one was registered is itself superseded."""
        self._present.add(ticket)
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
        self._present.discard(ticket)
        if episode_id is not None and self._newest.get(episode_id) is ticket:
            del self._newest[episode_id]

    def end_all(self, reason: str, problem: ServerError) -> None:
        """End every request at work; each caller gets `problem`."""
        for ticket in list(self._present):
            ticket.end(reason, problem)
