"""Robots that ask at the same time, and servers that are asked by turns."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vlm2vla_client.bench.probe import Pictures, Question, Sample, ask
from vlm2vla_client.errors import (
    AnswerCancelledError,
    AnswerUnusableError,
    EngineFailedError,
    PolicyError,
    ServerBusyError,
)
from vlm2vla_client.http import ServerConnection

COUNTED = (AnswerUnusableError, ServerBusyError, AnswerCancelledError, EngineFailedError)
"""What a loaded server may answer; counted, not timed. Anything else ends the bench."""
MAX_BUSY_WAIT_S = 5.0
WARM_UP = 2

Connect = Callable[[], ServerConnection]
Told = Callable[[int, int, int], None]
"""Called with (robots, requests done, requests in all); from several threads, one at a time."""


@dataclass(frozen=True)
class Target:
    """One server under test: its name in tables, how to reach it, and what it is asked."""

    name: str
    connect: Connect
    question: Question


@dataclass
class Tally:
    """What one server did for some robots: samples in the order they ended, errors by code."""

    samples: list[Sample] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Level:
    """One number of robots. ``pairs``: for two servers, samples of the same request and seed, one of each."""

    robots: int
    seconds: float
    tallies: dict[str, Tally]
    pairs: list[tuple[Sample, Sample]]


class _Robot:
    """One robot: its own episode, its own connection to each server, one request after another."""

    def __init__(self, targets: Sequence[Target], pictures: Pictures, first_seed: int) -> None:
        self._targets = targets
        self._pictures = pictures
        self._first_seed = first_seed
        self._episode_id = uuid.uuid4().hex
        self._connections = {target.name: target.connect() for target in targets}

    def turn(self, number: int, stop: threading.Event) -> dict[str, Sample | PolicyError]:
        """Request ``number`` to every server, the first of them changing from one turn to the next."""
        order = self._targets if number % 2 == 0 else list(reversed(self._targets))
        seed = self._first_seed + number
        found: dict[str, Sample | PolicyError] = {}
        for target in order:
            try:
                connection = self._connections[target.name]
                picture = self._pictures.take(seed)
                found[target.name] = ask(connection, target.question, picture, seed, self._episode_id)
            except COUNTED as error:
                found[target.name] = error
                if isinstance(error, ServerBusyError):
                    stop.wait(min(error.retry_after_s or 1.0, MAX_BUSY_WAIT_S))
        return found

    def close(self) -> None:
        """Closes its connections."""
        for connection in self._connections.values():
            connection.close()


def warm_up(targets: Sequence[Target], pictures: Pictures) -> None:
    """A few requests that are not counted; here every error is raised, so that a wrong set-up shows at once.

    Raises:
        PolicyError: a server gave no good answer.
    """
    for target in targets:
        connection = target.connect()
        try:
            for number in range(WARM_UP):
                ask(connection, target.question, pictures.take(number), number, uuid.uuid4().hex)
        finally:
            connection.close()


def measure(
    targets: Sequence[Target], pictures: Pictures, robots: int, requests: int, first_seed: int, told: Told
) -> Level:
    """``robots`` at once, each with ``requests`` requests to every target, one after another. Blocks. Seeds, and with
    them the pictures, count up from ``first_seed``.

    Raises:
        PolicyError: a server refused, was lost, or speaks another protocol.
    """
    tallies = {target.name: Tally() for target in targets}
    pairs: list[tuple[Sample, Sample]] = []
    lock, stop, done = threading.Lock(), threading.Event(), [0]

    def drive(index: int) -> None:
        robot = _Robot(targets, pictures, first_seed + index * requests)
        try:
            for number in range(requests):
                if stop.is_set():
                    return
                found = robot.turn(number, stop)
                with lock:
                    _count(found, tallies, pairs)
                    done[0] += 1
                    told(robots, done[0], robots * requests)
        except BaseException:
            stop.set()
            raise
        finally:
            robot.close()

    began_s = time.perf_counter()
    with ThreadPoolExecutor(robots, "bench-robot") as threads:
        try:
            for future in [threads.submit(drive, index) for index in range(robots)]:
                future.result()
        except BaseException:
            stop.set()
            raise
    return Level(robots, time.perf_counter() - began_s, tallies, pairs)


def _count(
    found: dict[str, Sample | PolicyError], tallies: dict[str, Tally], pairs: list[tuple[Sample, Sample]]
) -> None:
    good: dict[str, Sample] = {}
    for name, outcome in found.items():
        if isinstance(outcome, Sample):
            tallies[name].samples.append(outcome)
            good[name] = outcome
        else:
            tallies[name].errors[outcome.code] += 1
    names = list(tallies)
    if len(names) == 2 and len(good) == 2:
        pairs.append((good[names[0]], good[names[1]]))
